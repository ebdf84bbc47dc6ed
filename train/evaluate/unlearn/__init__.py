"""`train unlearn`: clamp the latents that carry one kind of text, and see what the model loses of it and of the rest.

Two protocols. `nll`, for any model: losses on texts of one's own, in `eval/unlearn.json`. `saebench`, for Gemma-2-it
models: SAEBench's questions, in `eval/unlearn-saebench.json`. Both choose latents in the same way (`selection`), change
the model in the same way (`clamp`) and keep every setting as soon as it is computed (`kept`).
"""
