"""The methods: one function each, pure maths on tensors or on a scoring function.

A method's required parameters *are* its requirements: `explain` looks at their names and hands it exactly those (the
names are the public attributes of `probe.cam.ingredients.Ingredients`). A new method is one more function like these.
Everything after the ``*`` is an option, given as ``functools.partial(cam.score_cam, official=True)``.

Throughout, A is the layer's output and g = ∂y/∂A the gradient of the explained score y, both ``[B, C, *spatial]``
with any number of spatial dimensions. Σ runs over positions, Σ_k over channels. Sums run in float32 at least,
whatever the dtypes.

Maps are raw and signed, ``[B, *spatial]``: the ReLU that most papers end with is for whoever shows the map (`overlay`
applies it), because it destroys the evidence against the class and cannot be undone.
"""
