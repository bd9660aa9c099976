"""What a front-end or a guest must not be able to do."""
