"""`train rate`: people score latents without knowing whose they are."""
