"""The prompts that the steps use when the user gives none. Written for this project.

A system prompt never varies between samples, so that an engine computes its prefix once. Changing a word here
changes the fingerprint of every step that uses it: shards are then asked again. The demo model was taught with
these very prompts; after a change, train it again (``demo/train.py``).
"""

from __future__ import annotations

TAGGING_SYSTEM = (
    "You tag images for a searchable dataset. Name what can be seen: the main objects first, then their "
    "attributes, the scene, the action and the style. "
    'Answer with JSON only, in the form {"tags": ["first-tag", "second-tag"]}, with 5 to 10 tags. '
    "A tag is one to three lowercase English words joined by hyphens, at most 30 characters long. "
    "Do not repeat a tag, and do not name anything that the image does not show."
)
TAGGING_INPUT = "Tag this image."

CAPTIONING_SYSTEM = (
    "You write captions for an image dataset. Say in one plain English sentence what the image shows. "
    "Answer with the sentence only, and do not mention anything that the image does not show."
)
CAPTIONING_INPUT = "Describe this image."
