"""A conversation with the policy of a run, or with its reference, in a terminal.

An answer is printed token by token as generation.answer_steps yields them, and below it the figures
that `runs.answer_rewards` computes. The conversation is the list of messages that the chat template
writes; without a template, each line is a text to continue.
"""
import contextlib
import importlib
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator

import torch

from encoder_decoder import decoder_prefix
from errors import UserError, printable, report
from generation import (
    Sampling,
    answer_steps,
    answer_text,
    check_prompt_room,
    encode_prompts,
    stop_ids,
)
from runs import Opened, answer_rewards, speaker

HELP = """/reset begins a new conversation    /reference switches between reference and policy
/help prints this    /quit or Ctrl-D leaves    Ctrl-C stops an answer"""


def writes_chat(args: Namespace, opened: Opened) -> bool:
    """Return whether a text is sent as a message. A model without a chat template continues it."""
    return opened.tokenizer.chat_template is not None and not args.plain


def sampling(args: Namespace) -> Sampling:
    return Sampling(args.max_new_tokens or 256, args.temperature, args.top_p or 1.0,
                    args.batch_size or 8)


def figures(answer: dict) -> str:
    """Format the numbers of an answer."""
    text = f"{answer['tokens']} tokens, log-prob per token {answer['logp'] / answer['tokens']:.3f}"
    if "reward" in answer:
        reference = answer["ref_logp"] / answer["tokens"]
        text += f" (reference {reference:.3f}), reward {answer['reward']:+.3f}"
    if "true_reward" in answer:
        truth = answer["true_reward"]
        text += ", malformed" if truth is None else f", true reward {truth:+.3f}"
    return text


def shown(text: str) -> str:
    """Escape what could control the terminal, except line breaks, tabs, and the joiners inside
    emoji and in Persian and Indian scripts."""
    characters = [each if each in "\n\t\u200c\u200d" else printable(each) for each in text]
    return "".join(characters)


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list]:
    """Yield a list to which each Ctrl-C is added, in place of a KeyboardInterrupt, which would be
    lost where a library catches every exception."""
    noted = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation in a terminal. Without a chat template each line is continued on its own."""

    def __init__(self, args: Namespace, opened: Opened, beta: float):
        self.args, self.opened, self.beta = args, opened, beta
        self.side, self.history = "policy", []
        self.generator = torch.Generator().manual_seed(args.seed or 0)
        self.ends = stop_ids(opened.policy.model, opened.tokenizer)

    def run(self):
        print(HELP)
        if not writes_chat(self.args, self.opened):
            print("each line is continued as text, because there is no chat template or --plain")
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):  # on Windows
            importlib.import_module("readline")  # then input() has arrow keys and a history
        while True:
            print()
            try:
                line = input(f"{self.side}> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.obey(line)
            elif line:
                self.reply(line)

    def obey(self, command: str):
        """Carry out a command."""
        if command == "/reset":
            self.history = []
            print("(a new conversation)")
        elif command == "/reference" and self.opened.reference is None:
            print("(there is no reference; give one by --ref_model)")
        elif command == "/reference":
            self.side = "policy" if self.side == "reference" else "reference"
            print(f"(the {self.side} answers)")
        else:
            print(HELP)

    def reply(self, line: str):
        """Answer a line. The conversation keeps the answer, also one that Ctrl-C stopped."""
        prompt = line
        if writes_chat(self.args, self.opened):
            prompt = [*self.history, {"role": "user", "content": line}]
        try:
            name = "the conversation (see /reset)"
            prompt_ids, = encode_prompts([prompt], self.opened.tokenizer, [name],
                                         self.opened.options, self.opened.family)
            check_prompt_room(self.opened.policy.model, [prompt_ids], [name])
        except UserError as error:
            report(str(error))
            return
        ids = self.stream(prompt_ids)
        if not ids:
            return
        if isinstance(prompt, list):
            context = self.opened.context(prompt_ids)
            text = answer_text(self.opened.tokenizer, context, ids, self.ends)
            self.history = [*prompt, {"role": "assistant", "content": text}]
        values, = answer_rewards(self.opened, self.beta, prompt_ids, [ids])
        print(f"({figures(values)})")

    def stream(self, prompt: list[int]) -> list[int]:
        """Print an answer token by token, until it ends or Ctrl-C -> its ids."""
        settings, ids, printed = sampling(self.args), [], ""
        context = self.opened.context(prompt)
        uniform = torch.rand((1, settings.max_new_tokens), generator=self.generator,
                             dtype=torch.float64)
        with noted_interrupts() as interrupts, speaker(self.opened, self.side) as model:
            prefix = decoder_prefix(model, self.opened.tokenizer)
            for tokens, _, _ in answer_steps(model, [prompt], settings, self.ends, uniform,
                                             prefix=prefix):
                if interrupts:
                    break
                ids.append(int(tokens[0]))
                text = answer_text(self.opened.tokenizer, context, ids, self.ends)
                # The last token may end inside a character.
                if not text.endswith("\ufffd"):
                    print(shown(text[len(printed):]), end="", flush=True)
                    printed = text
        print()
        return ids
