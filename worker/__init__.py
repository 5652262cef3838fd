"""Supervises runs, never trains: claim, spawn, heartbeat, record; and the janitor."""
