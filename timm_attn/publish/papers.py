"""What a card says about each mechanism's source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper and what this package does with it."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    summary: str

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


PAPERS = {
    "timm": Paper(
        "PyTorch Image Models",
        "Ross Wightman",
        "GitHub",
        2019,
        "",
        "A network of timm, trained as a baseline.",
    ),
    "": Paper(
        "Deep Residual Learning for Image Recognition",
        "Kaiming He and Xiangyu Zhang and Shaoqing Ren and Jian Sun",
        "CVPR 2016",
        2016,
        "1512.03385",
        "A plain residual network, the control of the networks with attention.",
    ),
    "se": Paper(
        "Squeeze-and-Excitation Networks",
        "Jie Hu and Li Shen and Samuel Albanie and Gang Sun and Enhua Wu",
        "CVPR 2018",
        2018,
        "1709.01507",
        "Channel attention in every block, the control of the newer mechanisms.",
    ),
    "dia": Paper(
        "DIANet: Dense-and-Implicit Attention Network",
        "Zhongzhan Huang and Senwei Liang and Mingfu Liang and Haizhao Yang",
        "AAAI 2020",
        2020,
        "1905.10671",
        "One recurrent attention unit shared by all blocks of a stage.",
    ),
    "asr": Paper(
        "Stripe Observation Guided Inference Cost-free Attention Mechanism",
        "Shanshan Zhong and Zhongzhan Huang and Wushao Wen and Jinghui Qin and Liang Lin",
        "ECCV 2024",
        2024,
        "2304.06345",
        "Channel attention on a learnt constant, which folds into the norm layer before it: nothing of it is "
        "left at inference.",
    ),
}
