"""What a front-end may rely on."""
