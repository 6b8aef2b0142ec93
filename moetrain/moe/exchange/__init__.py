"""What travels between ranks: token rows and expert weights."""
