"""The tiny trained mllama: scenes, questions, tokenizer, training, export, evaluation."""
