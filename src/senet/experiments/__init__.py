"""Many runs: compare, ablate."""
