"""Queue a graph with latent previews on, as a browser does, and print what its nodes showed while they worked.

python probe_previews.py URL GRAPH.json  ->  JSON [[node id, width, height], ...], and the texts [[node id, text]]
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import sys
import uuid
from pathlib import Path

import aiohttp
from PIL import Image

WITH_METADATA = 4  # the server's binary events: a picture with its node
TEXT = 3


async def main(url: str, graph: dict) -> dict:
    client = uuid.uuid4().hex
    pictures, texts = [], []
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            body = {"prompt": graph, "client_id": client, "extra_data": {"preview_method": "latent2rgb"}}
            async with session.post(f"{url}/prompt", json=body) as answer:
                prompt = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    (event,) = struct.unpack(">I", message.data[:4])
                    if event == WITH_METADATA:
                        (length,) = struct.unpack(">I", message.data[4:8])
                        about = json.loads(message.data[8 : 8 + length])
                        picture = Image.open(io.BytesIO(message.data[8 + length :]))
                        pictures.append([about["node_id"], *picture.size])
                    elif event == TEXT:
                        (length,) = struct.unpack(">I", message.data[4:8])
                        texts.append([message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()])
                elif message.type == aiohttp.WSMsgType.TEXT:
                    said = message.json()
                    if said["type"].startswith("execution_") and said["data"].get("prompt_id") == prompt:
                        if said["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                            return {"end": said["type"], "pictures": pictures, "texts": texts}
    raise RuntimeError("the server closed the connection")


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))))
