"""How a Hugging Face transformer is seen: its blocks, its cache, and the hooks between. Knows no mechanism."""
