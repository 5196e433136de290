"""What several tests share: actors (real processes that tests command) and models."""
