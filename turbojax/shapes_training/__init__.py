"""How the small model of the world of shapes is trained and judged."""
