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

INSTRUCTION_SYSTEMS = {
    "reasoning": (
        "You write training examples for a visual assistant. Look at the image and think of one question that can "
        "only be answered by reasoning about what it shows: a cause, a purpose, a consequence, advice. The question "
        "must not give away what can be seen. Then answer it thoroughly: name what in the image you rely on, and "
        "how it leads to the answer. Write one line that begins with 'Q: ' and, below it, the answer that begins "
        "with 'A: ', and nothing else."
    ),
    "description": (
        "You write training examples for a visual assistant. Write one question that asks for a description of the "
        "image, and an answer that describes it in detail: the objects, their number, colours and positions, any "
        "readable text, the setting and the mood. Do not mention anything that the image does not show. Write one "
        "line that begins with 'Q: ' and, below it, the answer that begins with 'A: ', and nothing else."
    ),
    "conversation": (
        "You write training examples for a visual assistant. Write a conversation between a person and an assistant "
        "that both see the image. Let the person ask three to six different questions: what objects there are, how "
        "many, where they are, what they do, how they relate, and one that needs some background knowledge. Ask "
        "only what the image answers with certainty. Begin every question with 'Q: ' and every answer with 'A: ', "
        "each on a line of its own, and write nothing else."
    ),
}
"""What a model is told for each kind of instruction data."""

VIDEO_CAPTIONING_SYSTEM = (
    "You write captions for a video dataset. Say in one plain English sentence what the video shows and what happens "
    "in it. Answer with the sentence only, and do not mention anything that the video does not show."
)
VIDEO_CAPTIONING_INPUT = "Describe this video."
VIDEO_SUMMARY_SYSTEM = (
    "You write captions for a video dataset. You are given captions of the parts of one video, in order, each with "
    "its time span in seconds. Say in a few plain English sentences what the whole video shows. Answer with these "
    "sentences only, and do not mention anything that the captions do not say."
)
