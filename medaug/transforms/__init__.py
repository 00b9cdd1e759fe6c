"""From a picture as read to a network tensor and back."""
