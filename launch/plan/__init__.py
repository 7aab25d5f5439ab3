"""``rlhf plan``: what a recipe needs of memory, disk and time on a cluster of a given shape, without a GPU or weights.

``shapes``, ``states``, ``activations``, ``compute`` and ``batches`` are pure functions of numbers; ``models``,
``roles`` and ``data`` count what the recipe says its run is made of; ``phases`` puts the parts side by side as a run
does, one phase after the other; ``planner`` and ``advice`` come to a verdict; ``report`` shows it. docs/plan.md has the
formulas in prose.
"""
