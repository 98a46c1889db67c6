"""The routing-path predictor: token ids in, a score for every expert of every layer out.

A small t5-style encoder-decoder (ExpertFlow, arXiv 2410.17954): the encoder reads the prompt, the
decoder the tokens decoded so far. Trained on traces with token ids, it forecasts a token's whole
path before the token's first layer, and which experts the tokens after it will use again.
"""
