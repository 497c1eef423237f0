"""What a pairwise judge reads: a conversation, two answers, and which is better. Free of JAX."""

from __future__ import annotations

from dataclasses import replace

from ministral_jax.data.conversation import Document, Message, spell

CHOICES = ("A", "B")
"""The judge's answers, each one token."""


def judge_messages(conversation: tuple[Message, ...], a: str, b: str) -> tuple[Message, ...]:
    """The user's message that asks which of two answers is better: text alone, without the reasoning of earlier turns.

    It is short, because a judgement reads it twice, in both orders.
    """
    turns = (f"{message.role}: {spell(message, thinking=False)}\n" for message in conversation)
    return (Message("user", (f"{''.join(turns)}A: {a}\nB: {b}\nBetter: A or B?",)),)


def judge_documents(document: Document, chosen: str, rejected: str) -> tuple[Document, Document]:
    """What a judge learns from a preference: both orders of the answers to a conversation, held out together.

    They are called `<name>#ab` and `<name>#ba`, and the answer is that of the chosen one.
    """

    def ask(order: str, a: str, b: str, better: str) -> Document:
        messages = (*judge_messages(document.messages, a, b), Message("assistant", (better,)))
        key = document.key or document.name
        return replace(document, name=f"{document.name}#{order}", messages=messages, tools=(), key=key)

    return ask("ab", chosen, rejected, CHOICES[0]), ask("ba", rejected, chosen, CHOICES[1])
