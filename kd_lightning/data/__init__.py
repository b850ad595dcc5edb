"""Lightning data modules over uint8 images, augmented batch by batch."""
