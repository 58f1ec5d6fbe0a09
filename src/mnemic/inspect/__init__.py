"""What a saved session holds, in the terminal, as a page and in a notebook; nothing in the core imports it."""
