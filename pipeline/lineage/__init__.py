"""Where a model came from: its record, licences and terms, bill of materials, signature, and the model card."""
