"""From a user's file to model inputs: formats, images, validation, the canonical dataset, template and collator."""
