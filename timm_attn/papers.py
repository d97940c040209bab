"""What a card says about a network's source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper, and how far this package follows it.

    Attributes:
        arxiv: arXiv id, or '' for what was not published there.
        summary: What the mechanism does, in one sentence.
        caveat: What a reader must know before comparing with the paper.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    summary: str
    caveat: str = ""

    @property
    def url(self) -> str:
        """Where it can be read."""
        return (
            f"https://arxiv.org/abs/{self.arxiv}"
            if self.arxiv
            else "https://github.com/huggingface/pytorch-image-models"
        )

    @property
    def bibtex(self) -> str:
        return (
            f"@misc{{{self.title.split()[0].lower().strip(':')}{self.year},\n  title  = {{{self.title}}},\n"
            f"  author = {{{self.authors}}},\n  year   = {{{self.year}}},\n"
            f"  note   = {{{self.venue}}},\n  url    = {{{self.url}}}\n}}"
        )


#: For networks that are timm's own.
TIMM = Paper(
    "PyTorch Image Models",
    "Ross Wightman",
    "GitHub",
    2019,
    "",
    "A network of timm, trained as a baseline.",
)
