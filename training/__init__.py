"""How the bundled sticker models are made: scenes, training, judging, export."""
