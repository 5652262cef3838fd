"""What the preflight's rule and the memory estimate rest on: see README.md here."""
