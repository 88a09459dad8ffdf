"""The speed benchmark; see docs/speed.md. `scripts/bench` runs it."""
