"""What a node has to say, on the node itself."""

from __future__ import annotations

import sys

import comfy.utils
from comfy_api.latest import io, ui
from PIL import Image


def show_text(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a text under a running node, and return it as the node's ``ui``, which keeps it in the history.

    The node's schema needs ``hidden=[io.Hidden.unique_id]``.
    """
    # Not imported: where nodes are called from a script there is no server, and to load one takes a second.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node.hidden is not None:
        server.send_progress_text(text, node.hidden.unique_id)
    return ui.PreviewText(text)


def show_picture(picture: Image.Image) -> None:
    """Show a picture on the running node as its last preview: the frontend keeps that over what the node returns."""
    bar = comfy.utils.ProgressBar(1)
    bar.update_absolute(1, 1, ("JPEG", picture, max(picture.size)))
