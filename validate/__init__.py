"""How a model is judged: task, data, predictions, scorecard, gate. Knows no other folder."""
