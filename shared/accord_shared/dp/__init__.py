"""What is sensitive, what it costs, and the noise that pays for it."""
