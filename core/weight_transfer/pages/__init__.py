"""HTML pages that need nothing but themselves: one style, and what several of them draw alike."""
