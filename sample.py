"""Ask a trained model and its reference, chat with it, or score a preference file by it.

    python sample.py --model runs/dpo --prompt "Why is the sky blue?"
    python sample.py --model runs/dpo --prompts prompts.txt --temperature 0.7 --out answers.jsonl
    python sample.py --model runs/dpo --dataset pairs.jsonl --count 20
    python sample.py --model runs/dpo                                    # in a terminal: a chat
    python sample.py --model runs/dpo --score pairs.jsonl --out scores.jsonl

Policy and reference answer each prompt. Below an answer are its log-prob per token under the policy
and the implicit reward, β times the log-ratio of policy to reference: above 0 the policy prefers
the answer more than the reference does. runs.py has what --model may be, generation.py how an
answer is generated, audit.py what --score prints.
"""
from errors import (  # first, see errors.py
    Parser,
    UserError,
    any_name,
    printable,
    run_script,
)
import argparse
import json
import pathlib
import shutil
import sys
import textwrap
from typing import NamedTuple

import torch

import data
from audit import load_scored_rows, score_file, write_lines
from chat import Chat, figures, sampling, shown, writes_chat
from generation import Answer, answer_text, check_prompt_room, encode_prompts, generate, stop_ids
from ranges import real_number, whole_number
from runs import Opened, answer_rewards, open_run, speaker
from world import true_reward_of

# --- Prompts --------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """A prompt, and the answers that its file has for it."""
    name: str
    ids: list[int]
    answers: dict[str, list[int]]  # {"chosen": ids, ...}


def read_prompts(path: str) -> tuple[list, list[str]]:
    """Read --prompts: a text file with a prompt on each line, or JSON lines, each a string, a list
    of messages, or an object whose "prompt" is one of these -> prompts and their names."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})") from error
    prompts, names = [], []
    for number, line in enumerate(lines, 1):
        name = f"{path}:{number}"
        if line.strip():
            prompts.append(read_json_prompt(line, name) if path.endswith(".jsonl") else line)
            names.append(name)
    if not prompts:
        raise UserError(f"--prompts {path}: there is no prompt in it; write one on each line")
    return prompts, names


def read_json_prompt(line: str, name: str) -> str | list:
    """Read the prompt of a JSON line."""
    try:
        prompt = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: is not JSON ({error})") from error
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt", prompt.get("messages"))
    if isinstance(prompt, str) and prompt.strip() or is_chat(prompt):
        return prompt
    raise UserError(f'{name}: has no prompt; write {{"prompt": "text"}}, or a list of messages '
                    'such as [{"role": "user", "content": "text"}] in place of "text"')


def is_chat(prompt) -> bool:
    """Return whether a value is a list of messages with the text of a role each."""
    if not isinstance(prompt, list) or not prompt:
        return False
    for message in prompt:
        if not isinstance(message, dict):
            return False
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return False
    return True


def collect_prompts(args, opened: Opened) -> list[Prompt]:
    """Return the prompts of --prompt, --prompts or --dataset, as token ids."""
    if args.dataset:
        return prompts_of_rows(args, opened)
    if args.prompts:
        texts, names = read_prompts(args.prompts)
    else:
        texts, names = [args.prompt], ["--prompt"]
    chats = []
    for text, name in zip(texts, names):
        is_message = isinstance(text, str) and writes_chat(args, opened)
        chats.append([{"role": "user", "content": text}] if is_message else text)
        if not isinstance(text, str) and opened.tokenizer.chat_template is None:
            raise UserError(f"{name}: holds messages, and the model has no chat template; write "
                            "the prompt as text")
    rows = encode_prompts(chats, opened.tokenizer, names, opened.options, opened.family)
    return [Prompt(name, ids, {}) for name, ids in zip(names, rows)]


def prompts_of_rows(args, opened: Opened) -> list[Prompt]:
    """Return the first --count rows of --dataset, read as training reads them."""
    rows, account = load_scored_rows(opened, args.dataset)
    print(data.describe(account), file=sys.stderr)
    if "image_paths" in rows.column_names:
        raise UserError(f"--dataset {args.dataset}: has images, and prompts with images are not "
                        "answered here; --score scores the answers of the file, and transformers' "
                        "generate answers with the model and AutoProcessor of --model")
    prompts = []
    for row in rows.select(range(min(args.count or len(rows), len(rows)))):
        names = data.answer_names(row)
        prompts.append(Prompt(row["id"], row["prompt_ids"], dict(zip(names, row["answer_ids"]))))
    return prompts


# --- Answers and their rewards --------------------------------------------------------------------

def answer_all(args, opened: Opened, beta: float, prompts: list[Prompt]) -> list[dict]:
    """Answer every prompt by policy and reference -> one object for each, as --out has it."""
    sides = ["policy"] + ["reference"] * (opened.reference is not None)
    settings, by_side = sampling(args), {}
    rows = [prompt.ids for prompt in prompts]
    for side in sides:
        # Both sides get the same random numbers, so that they differ by their models alone.
        generator = torch.Generator().manual_seed(args.seed or 0)
        with speaker(opened, side) as model:
            check_prompt_room(model, rows, [prompt.name for prompt in prompts])
            by_side[side] = generate(model, opened.tokenizer, rows, settings, generator)
    ends, lines = stop_ids(opened.policy.model, opened.tokenizer), []
    for i, prompt in enumerate(prompts):
        written = {side: by_side[side][i] for side in sides}
        lines.append(describe_prompt(opened, beta, prompt, written, ends))
    return lines


def describe_prompt(opened: Opened, beta: float, prompt: Prompt,
                    written: dict[str, Answer], ends: set[int]) -> dict:
    """Make the object of one prompt: the text, log-probs and reward of each answer, and in the
    world its true reward."""
    text = opened.tokenizer.decode(prompt.ids)
    line, ids = {"id": prompt.name, "prompt": text}, {}
    for side, answer in written.items():
        line[side] = {"text": answer.text, "ended": answer.ended}
        ids[side] = answer.ids
    for name, answer_ids in prompt.answers.items():
        context = opened.context(prompt.ids)
        line[name] = {"text": answer_text(opened.tokenizer, context, answer_ids, ends)}
        ids[name] = answer_ids
    measured = answer_rewards(opened, beta, prompt.ids, list(ids.values()))
    for name, values in zip(ids, measured):
        line[name] |= values
        if opened.args.model == "world":
            line[name]["true_reward"] = true_reward_of(text, line[name]["text"])
    return line


# --- Printed --------------------------------------------------------------------------------------

def print_lines(lines: list[dict]) -> None:
    """Print each prompt, both answers side by side, and the answers of its file."""
    for line in lines:
        print(f"\n[{printable(line['id'])}] {shown(line['prompt']).strip()}")
        sides = [name for name in ("policy", "reference") if name in line]
        width = max(shutil.get_terminal_size().columns, 80) // len(sides) - 2
        columns = [answer_column(name, line[name], width) for name in sides]
        for row in range(max(map(len, columns))):
            cells = [column[row] if row < len(column) else "" for column in columns]
            print(" | ".join(f"{cell:{width}}" for cell in cells).rstrip())
        for name in [name for name in line if name not in ("id", "prompt", *sides)]:
            print(f"-- {name}\n{shown(line[name]['text']).strip()}\n({figures(line[name])})")


def answer_column(name: str, answer: dict, width: int) -> list[str]:
    """Wrap an answer, below its name and above its figures."""
    lines = [f"-- {name}"]
    for paragraph in shown(answer["text"]).strip().split("\n"):
        lines += textwrap.wrap(paragraph, width) or [""]
    if not answer["ended"]:
        lines[-1] += " …"
    return lines + textwrap.wrap(f"({figures(answer)})", width)


# --- The command line -----------------------------------------------------------------------------

def parse_sample_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the models").add_argument
    add("--model", default="world", help="a run, an adapter or a model, or world (default)")
    add("--base", help="the model below an adapter, if the one that its file names is gone")
    add("--ref_model", help="another reference than that of the run")
    add("--no_reference", action="store_true", help="load no reference")
    add("--beta", type=real_number("> 0"), help="of the implicit reward (default: that of the run)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"),
        help="dtype of the computation (default: that of the run)")
    add = parser.add_argument_group("what to do; without one of these, chat").add_argument
    add("--prompt", help="answer this prompt")
    add("--prompts", type=any_name, help="answer each line of a file: text, or .jsonl")
    add("--dataset", type=any_name, help="answer the prompts of a preference file, or world")
    add("--score", type=any_name,
        help="score the answers of a preference file, or world, and audit its labels")
    add("--count", type=whole_number(">= 1"), help="first rows of --dataset (default: all)")
    add("--plain", action="store_true", help="send prompts as text, without the chat template")
    add("--out", help="a file of JSON lines for the answers or scores")
    add = parser.add_argument_group("how answers are sampled").add_argument
    add("--temperature", type=real_number(">= 0"), default=0.0,
        help="0: the most probable token (default); 0.7 to 1 are usual")
    add("--top_p", type=real_number("(0, 1]"),
        help="sample from the most probable tokens with this probability together (default 1)")
    add("--seed", type=whole_number(">= 0"), help="seed of the sampled answers (default 0)")
    add("--max_new_tokens", type=whole_number("[1, 1000000]"), help="tokens of an answer, at most "
        "(default 256)")
    add("--batch_size", type=whole_number(">= 1"), help="prompts of one forward (default 8)")
    rows = parser.add_argument_group("the rows of --dataset and --score (defaults: the run's)")

    def add_row_flag(name, **options):
        rows.add_argument(name, **options | {"default": argparse.SUPPRESS})

    data.add_flags(add_row_flag)
    return parser.parse_args(argv)


def row_flags(args) -> dict:
    """Return the flags of rows that were given."""
    names = []
    data.add_flags(lambda name, **options: names.append(name.removeprefix("--")))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def check_sample_args(args) -> None:
    """Refuse flags that contradict each other, and those that would not be read."""
    given = [name for name in ("prompt", "prompts", "dataset", "score") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: give one of them")
    task = given[0] if given else "chat"
    if task == "chat" and not sys.stdin.isatty():
        raise UserError("there is no prompt, and no terminal to chat in: give --prompt, --prompts, "
                        "--dataset or --score")
    unread = {"count": task != "dataset", "out": task == "chat",
              "plain": task in ("dataset", "score"), "top_p": args.temperature == 0,
              "seed": args.temperature == 0, "temperature": task == "score",
              "max_new_tokens": task == "score", "batch_size": task in ("chat", "score")}
    for name, is_unread in unread.items():
        if is_unread and getattr(args, name):
            reason = "--temperature 0" if name in ("top_p", "seed") else f"a {task}"
            raise UserError(f"--{name}: is not read with {reason}; leave it out")
    if args.no_reference and args.ref_model:
        raise UserError(f"--ref_model {args.ref_model} and --no_reference: give one of them")
    for name in row_flags(args):
        is_of_chats = name in ("chat_template", "template_kwargs") and not args.plain
        if task not in ("dataset", "score") and not is_of_chats:
            raise UserError(f"--{name}: is read with --dataset or --score only")
    if args.out and pathlib.Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, such as answers.jsonl")


def main(argv: list[str]):
    args = parse_sample_args(argv)
    check_sample_args(args)
    changed = row_flags(args)
    for name in ("beta", "dtype"):
        if getattr(args, name):
            changed[name] = getattr(args, name)
    opened = open_run(args.model, args.base, args.ref_model, not args.no_reference, **changed)
    for note in opened.notes:
        print(note, file=sys.stderr)
    beta = args.beta or opened.hyper.get("beta", 1.0)
    if args.score:
        score_file(opened, args.score, args.out)
    elif args.prompt or args.prompts or args.dataset:
        lines = answer_all(args, opened, beta, collect_prompts(args, opened))
        if args.out:
            write_lines(args.out, lines)
        print_lines(lines)
    else:
        Chat(args, opened, beta).run()


if __name__ == "__main__":
    run_script(main)
