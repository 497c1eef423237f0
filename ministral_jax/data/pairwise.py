"""What is made of a preference, a conversation with two answers, one of which is better: a question to a judge, or a
pair for a policy. Free of JAX."""

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


def pair_document(
    document: Document, chosen: tuple[Message, ...], rejected: tuple[Message, ...], margin: float
) -> Document:
    """What a policy learns from a preference: `document`, a prompt, once with the messages of each answer, which alone
    are learnt.

    Args:
        margin: log p / (1 - p), where p is the probability that the chosen answer is better, or the difference of their
            scores, which is the same if these are the rewards of Bradley and Terry; NaN where neither is known.
    """
    prompt = tuple(replace(message, target=False) for message in document.messages)
    return replace(document, messages=(*prompt, *chosen), rejected=(*prompt, *rejected), margin=margin)
