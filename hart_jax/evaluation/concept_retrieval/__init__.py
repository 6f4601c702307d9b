"""Do images show what their captions ask for? A metric of this project's own, which needs no network that reads text.

`recall` is the metric; it looks for `neighbours` in a space learned by `discriminant`, also from `blurred_copies`.
"""
