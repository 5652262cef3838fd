"""The HTTP front end, and the owner of the job record."""
