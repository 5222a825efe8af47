"""What the gates do: counts over images, claims that can be tested, pictures."""
