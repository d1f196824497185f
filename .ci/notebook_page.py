"""Writes `quickstart.ipynb` as a Markdown page with its stored outputs, for the site.

python .ci/notebook_page.py
"""

import base64
import json
import pathlib

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def to_markdown(notebook: dict, image_name: str) -> tuple[str, list[bytes]]:
    """Returns the page and its images.

    Args:
      notebook: content of an `.ipynb` file.
      image_name: file name of the images, with `{}` for their number.
    """
    parts, images = [], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output of the cell above]({image_name.format(len(images))})")
                images.append(base64.b64decode(data["image/png"]))
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", images


def main() -> None:
    """Writes `quickstart.md` and its images beside the notebook."""
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    page, images = to_markdown(notebook, "quickstart_{}.png")
    link = "[Download this page as a notebook](quickstart.ipynb)."
    title, _, rest = page.partition("\n")
    (DOCS / "quickstart.md").write_text(f"{title}\n\n{link}\n{rest}", encoding="utf-8")
    for number, image in enumerate(images):
        (DOCS / f"quickstart_{number}.png").write_bytes(image)


if __name__ == "__main__":
    main()
