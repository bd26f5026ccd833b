"""Entry point for ComfyUI, which imports this folder as a package; the headless core is `distill_core`."""
