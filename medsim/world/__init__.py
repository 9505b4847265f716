"What a patient's irregular chart means, what will come of it, and policies trained in what was imagined."
