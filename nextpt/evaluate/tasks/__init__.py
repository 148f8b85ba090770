"""What a model can do, on small tasks that need no download: how often exactly, and how nearly."""
