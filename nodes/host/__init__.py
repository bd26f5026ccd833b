"""All that knows ComfyUI's own modules; everything else only knows its node API."""
