"""The rooms of `scripts/serve` and `scripts/stop`: verifies archives, starts TorchServe, waits for true readiness."""
