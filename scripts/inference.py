"""Ask the fine-tuned model questions interactively; `exit` quits.

python scripts/inference.py                # the adapter in finetuned_model/ on its base model
python scripts/inference.py MODEL_FOLDER   # a model without an adapter, such as a fused one
"""

import sys

from mlx_fish.backends.protocol import Sampling
from mlx_fish.data.templates.template import choose_template
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.errors import FishError
from mlx_fish.inference.answers import stream, turns_of
from mlx_fish.inference.session import Session, load_session
from mlx_fish.models.hub import find_model


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    try:
        session = (
            base_session(sys.argv[1])
            if len(sys.argv) == 2
            else load_session(model=None, adapter=None, no_adapter=False)
        )
        backend = session.load()
    except FishError as error:
        sys.exit(f"Error: {error}")
    while (question := ask("Question (or `exit`): ")) != "exit":
        if not question:
            continue
        context = ask("Additional input (or Enter): ")
        if context == "exit":
            break
        for piece in stream(session, backend, turns_of(question, input=context), Sampling(repetition_penalty=1.1)):
            print(piece, end="", flush=True)
        print("\n")


def base_session(model: str) -> Session:
    """Return a session without an adapter, with the template that training would choose for the model."""
    folder = find_model(model)
    return Session(folder, None, choose_template("auto", load_tokenizer(folder), folder))


def ask(prompt: str) -> str:
    """Read a line from stdin, with the prompt on stderr; the end of the input counts as `exit`."""
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else "exit"


if __name__ == "__main__":
    main()
