"""The mathematics: tensors and plain numbers in, tensors or NamedTuples out, with torch and the standard library only.

Symbols: E evaluation batch, U update batch; θ parameters, v the optimizer step per unit of learning rate, η step size;
ℓ log-probability of a token, h entropy of the distribution it was drawn from, A advantage, τ temperature.
∂_v is the derivative along v, written as a dot over per-token quantities (ℓ̇, ḣ). η = learning rate is the trainer's own
step. Entropies and log-probabilities are in nats, and derivatives along v are per unit of η ("per unit step").

Shape legend, used as suffixes of tensor names:
    N  sequences                     K  tokens of all sequences, concatenated ("flat", with offsets_N1)
    B  rows of a padded micro-batch  L  its padded length
    R  rows of a chunk of positions  V  vocabulary      D  hidden width      P  prompts      G  responses per prompt
    T  positions in a response       C  clusters
"""
