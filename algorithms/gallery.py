r"""Cards of the method gallery: the formula of each method, when to use it, and what the project's study showed.

`page` returns docs/gallery.md, except for its introduction: summary, source, options and presets come from the
registry. Formulas use the symbols of the page: r the probability ratio, A the advantage, R the reward, y the token.
"""

from typing import NamedTuple

from tokfuse.algorithms.registry import ENTRIES, KINDS, Entry

BEGIN, END = (
    "<!-- gallery: written by `python -m tokfuse algorithms --gallery docs/gallery.md` -->",
    "<!-- /gallery -->",
)


class Card(NamedTuple):
    """Texts about a method that its registry entry does not have."""

    formula: str
    """LaTeX of the loss or, for a method that changes one part of another loss, of this part."""
    when: str
    study: str = ""
    """The result of docs/algorithm_study.md; "" if the method was not in it."""


_CLIP = r"\max\left(-rA,\; -\operatorname{clip}(r, 1-\epsilon_l, 1+\epsilon_h) A\right)"
_U = r"u = \beta\left(\log\frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)}\right)"

CARDS = {
    # ------------------------------------------------------------------------------- policy: the family
    "ppo": Card(
        rf"L = {_CLIP}, \quad A = \sum_k (\gamma\lambda)^k \delta_{{t+k}}",
        "You have a value model and want the baseline of most papers.",
    ),
    "ppo_dual": Card(
        rf"L = \min\left({_CLIP},\; 3|A|\right) \text{{ for }} A < 0",
        "PPO with stale data becomes unstable through large ratios of bad tokens.",
    ),
    "grpo": Card(
        rf"L = {_CLIP} + \beta\left(e^{{-k}} - 1 + k\right), \quad A = \frac{{R - \bar R}}{{\sigma_R + \epsilon}}, "
        r"\quad k = \log\frac{\pi}{\pi_{\text{ref}}}",
        "The first method to try with several answers per prompt and no value model.",
        "On fresh data it ends at a reward of 0.996. On stale data it loses its entropy early and the seeds diverge.",
    ),
    "dr_grpo": Card(
        r"A = R - \bar R, \quad L = \frac{1}{B \, T_{\text{max}}} \sum_i \sum_t \ell_{i,t}",
        "Answers become longer without becoming better: the loss has no length bias.",
    ),
    "dapo": Card(
        r"L = \frac{1}{\sum_i T_i}\sum_i\sum_t \ell_{i,t}, \quad \epsilon_l = 0.2, \; \epsilon_h = 0.28",
        "Long reasoning with GRPO. The data loader must refill the batch, because uniform groups are removed.",
        "On SmolLM2-135M it ends 0.026 above GRPO, within the noise of the run.",
    ),
    "rloo": Card(
        r"A_i = R_i - \frac{1}{G-1}\sum_{j \ne i} R_j", "You want an unbiased baseline from few answers per prompt."
    ),
    "remax": Card(r"A = R - R_{\text{greedy}}", "You can afford one greedy answer per prompt and want no groups."),
    "opo": Card(
        r"A_i = R_i - \frac{\sum_j n_j R_j}{\sum_j n_j}, \quad L = -A \log\pi(y)",
        "Training is strictly on policy: there is no ratio and no clip.",
    ),
    "reinforce_pp": Card(
        r"A_t = \operatorname{whiten}\left(\sum_{s \ge t} \gamma^{s-t}\left(R_s - \beta k_s\right)\right)",
        "You have one answer per prompt and no value model.",
    ),
    "reinforce_pp_baseline": Card(
        r"A = \operatorname{whiten}\left(R - \bar R\right)", "As REINFORCE++, with several answers per prompt."
    ),
    "gpg": Card(
        r"L = -A \log\pi(y), \quad A = \frac{R - \bar R}{F}, \quad F = \text{share of answers in mixed groups}",
        "You want a policy gradient without ratio, clip or KL.",
    ),
    "pass_at_k": Card(
        r"A_{\text{best}} = \frac{R_{\text{max}} - R_{\text{2nd}}}{\sigma_R + \epsilon}, \quad A_{\text{others}} = 0",
        "Your metric is the best of k answers, not the mean.",
    ),
    "maxrl": Card(
        r"A = \frac{R - \bar R}{\bar R + \epsilon}", "Rewards are 0 or 1 and hard prompts should count more."
    ),
    "otb": Card(
        r"A_t = G_t - \frac{\sum_j G_{j,t} W_{j,t}}{\sum_j W_{j,t}}, \quad "
        r"W_t = \sum_{s \le t}\left(1 - 2 p_s + \sum_v p_{s,v}^2\right)",
        "You want the baseline of least variance. tokfuse gives the sum of squares without a further pass.",
    ),
    "gspo": Card(
        r"L = \max\left(-sA,\; -\operatorname{clip}(s, 1-\epsilon_l, 1+\epsilon_h)A\right), \quad "
        r"s = \exp\left(\frac{1}{T}\sum_t \log r_t\right)",
        "Mixture-of-experts models or stale data, where token ratios are noisy.",
        "Final reward of 0.862 on stale data (GRPO 0.642), with 6% of the tokens in the backward instead of 15%.",
    ),
    "gspo_token": Card(
        r"s_t = \operatorname{sg}(s)\,\frac{\pi(y_t)}{\operatorname{sg}(\pi(y_t))}",
        "As GSPO, with a different advantage for each token.",
    ),
    "cispo": Card(
        r"L = -\operatorname{sg}\left(\min(r, r_{\text{max}})\right) A \log\pi(y)",
        "Rare but important tokens must keep their gradient, which a PPO clip removes.",
    ),
    "gmpo": Card(
        r"L = -A \exp\left(\frac{1}{T}\sum_t \operatorname{clamp}(\log r_t)\right)",
        "Outliers of the token ratio dominate GRPO.",
    ),
    "sapo": Card(
        r"L = -\frac{4}{\tau}\,\sigma\left(\tau (r - 1)\right) A", "You want a smooth gate in place of a hard clip."
    ),
    "vespo": Card(
        r"L = -\operatorname{sg}\left(e^{\lambda} s^{k} e^{-\lambda s}\right) A \log\pi(y), \quad s = \prod_t r_t",
        "Asynchronous training, with answers from much older policies.",
    ),
    "high_entropy": Card(
        r"L = \frac{1}{N}\sum_t \mathbf{1}\left[H_t \ge q_{0.8}(H)\right] \ell_t",
        "Long reasoning: most tokens are certain and can be skipped.",
        "Learns more slowly on short answers (0.682, GRPO 0.996), where a fifth of four tokens is too few.",
    ),
    "clip_cov": Card(
        r"L_t = 0 \text{ for a few tokens with large } "
        r"\left(\log\pi(y_t) - \overline{\log\pi}\right)\left(A_t - \bar A\right)",
        "The entropy collapses, and a bonus is hard to tune.",
        "Stale data: higher reward with the authors' preset (0.860, GRPO 0.662). Keeps the entropy: not confirmed.",
    ),
    "kl_cov": Card(
        r"L_t = -rA + \beta\left|\log\pi(y_t) - \log\pi_{\text{old}}(y_t)\right| "
        r"\text{ for tokens with large covariance}",
        "As Clip-Cov, with a soft penalty.",
        "Final reward of 0.783 on stale data (GRPO 0.662), with a lower entropy.",
    ),
    "ar": Card(
        r"A_t \leftarrow A_t \left(\alpha \pi_{\text{old}}(y_t) + 1 - \alpha\right)",
        "Rare tokens dominate the gradient norm.",
    ),
    "vapo": Card(
        r"\lambda = 1 - \frac{1}{\max(\alpha T, 1)}, \quad "
        r"L = L_{\text{PPO}} - \mu\,\overline{\log\pi(y)}_{\text{correct}}",
        "You have a value model and answers of very different length.",
    ),
    # --------------------------------------------------------------------- rollout engine and trainer
    "tis": Card(
        r"L_t \leftarrow \min(w_t, 2)\, L_t, \quad w_t = \frac{\pi_{\text{old}}(y_t)}{\pi_{\text{sampler}}(y_t)}",
        "The rollout engine's probabilities differ slightly from the trainer's.",
    ),
    "seq_tis": Card(r"L \leftarrow \min\left(\prod_t w_t, 2\right) L", "As TIS, unbiased for whole answers."),
    "mis": Card(
        r"L \leftarrow w\,\mathbf{1}[w \le 3]\, L, \quad w = \prod_t w_t",
        "Answers with a large mismatch should be dropped.",
    ),
    "icepop": Card(
        r"L_t \leftarrow w_t\,\mathbf{1}[0.5 \le w_t \le 5]\, L_t",
        "Mixture-of-experts models, with wild single tokens.",
    ),
    "geo_rs": Card(
        r"\text{keep the answer if } 0.999 \le \left(\prod_t w_t\right)^{1/T} \le 1.001",
        "Long answers, where products of weights degenerate.",
    ),
    "seq_mask_tis": Card(
        r"L_t \leftarrow w_t\,\mathbf{1}\left[0.5 \le \left(\prod_s w_s\right)^{1/T} \le 5\right] L_t",
        "Token weights, with a test on the whole answer.",
    ),
    "opsm": Card(
        r"\text{drop the answer if } A < 0 \text{ and } \frac{1}{T}\sum_t "
        r"\log\frac{\pi_{\text{sampler}}(y_t)}{\pi(y_t)} > \delta",
        "Stale wrong answers push the policy away from text that it no longer writes.",
    ),
    # ------------------------------------------------------------------------------- policy: by paper
    "cdpo": Card(
        r"L = L_{\text{clip}} - 0.01\left(e^{-k} - 1 + k\right), \quad k = \log\frac{\pi}{\pi_{\text{bias}}}",
        "A frozen model shows the shortcut that the policy should not learn.",
        "Stops following a wrong hint (0.191 compared with 0.759), but unlearns the task at the published coefficient.",
    ),
    "a2pr_nll": Card(
        r"L = L_{\text{base}} - \mu\,\mathbf{1}[A_{\text{best}} > 0] \log\pi(y_{\text{best}})",
        "You want imitation of the best answer of each group.",
    ),
    "adora": Card(
        r"A \leftarrow w_g A, \quad w_g \in \{1, w\}", "Prompts with longer correct answers should count more, or less."
    ),
    "bapo": Card(
        r"L = \max\left(-rA,\; -\operatorname{clip}(r, c_{\text{low}}, c_{\text{high}})A\right), \quad "
        r"\frac{\sum_{A>0} |L|}{\sum |L|} \ge \rho",
        "Old answers, most of them wrong.",
        "Released settings on stale data: 0.870, GRPO 0.662. Faster and more stable off policy: confirmed. "
        "Keeps the entropy: not confirmed.",
    ),
    "cip_entropy": Card(
        r"L = L_{\text{base}} - \lambda\,\frac{\sum_t u_t H_t}{\sum_t u_t}", "You know which tokens should explore."
    ),
    "d3s": Card(
        r"S = \operatorname{argmax}_{|S| = n} \operatorname{Var}(A), \quad T = \operatorname{top}_K |A_t| H_t",
        "The backward is the bottleneck, and rollouts are cheap.",
        "Reaches GRPO's final reward with 16% of the tokens in the backward instead of 29%: confirmed.",
    ),
    "dcpo_dist": Card(
        r"A_t \leftarrow (1-\alpha) A_t + \alpha\,\mathbf{1}[R > c]\,"
        r"\frac{\pi_{\text{old}}^{T}(y_t)}{\pi_{\text{old}}(y_t)}",
        "The entropy should follow a target.",
        "At 0.719 on stale data (GRPO 0.642). Controls the entropy: not confirmed.",
    ),
    "dypo": Card(
        r"L = \begin{cases} \text{imitation} & \text{all wrong} \\ "
        r"\alpha L_{\text{GRPO}} + (1-\alpha) L_{\text{pairs}} & "
        r"\text{mixed} \\ 0 & \text{all correct} \end{cases}",
        "You have traces of a teacher for hard prompts.",
    ),
    "epo": Card(
        r"L = L_{\text{base}} - c\left(\bar H - \beta_k \bar P\right), \quad P > 0 \text{ outside } "
        r"\left[\kappa_{\text{low}} h, \kappa_{\text{high}} h\right]",
        "Agents with many turns, whose entropy first explodes and then collapses.",
        "Keeps an entropy of 0.92 on stale data. Its reward does not differ from GRPO's.",
    ),
    "gbpo": Card(
        r"L = |r - r^*|\,|A|, \quad r^* = 1 - \epsilon_l + (\epsilon_l + \epsilon_h)\,\sigma"
        r"\left(\frac{R - \operatorname{med}}{\tau\,\sigma_R}\right)",
        "Many epochs on the same rollout: ratios outside the bounds are pulled back.",
        "Stable on stale data: confirmed. Higher final reward: not confirmed.",
    ),
    "bpo": Card(
        r"L = |r - r^*|\,|Q - V|, \quad r^* \text{ from } (Q - \operatorname{med}) / \lambda", "As GBPO, with a critic."
    ),
    "grpo_guard": Card(
        r"\log r = \frac{1}{D}\sum_d z_d \Delta_d, \quad L = \max\left(-rA, -\operatorname{clip}(r)A\right) / dt",
        "Flow-matching models with Gaussian latents, not tokens.",
    ),
    "lopti": Card(
        r"L_1 = \sum_{\pi_{\text{old}}(y_t) < \eta} \ell_t, \quad L_2 = \sum_{\pi_{\text{old}}(y_t) \ge \eta} \ell_t, "
        r"\quad \text{one update each}",
        "Gradients of rare tokens hide the gradients of common tokens.",
        "Fresh data: higher mean reward than GRPO in all five seeds, confirmed. Stale data: not confirmed.",
    ),
    "mirror_descent": Card(
        r"L = -rA + \frac{1}{\eta}\operatorname{KL}(\pi \,\|\, \pi_k)",
        "You want the step of the theory, without a clip.",
    ),
    "nft": Card(
        r"L = \begin{cases} -A \log r & A > 0 \\ -|A| \log\frac{1 - q r}{1 - q} & A < 0 \end{cases}, "
        r"\quad q = \text{success rate}",
        "You would use rejection fine-tuning, and want to learn from wrong answers too.",
        "Above GRPO on stale data in all five seeds (0.773, GRPO 0.662). Learns from wrong answers: confirmed.",
    ),
    "pipo": Card(
        r"L_{\text{previous}} = \text{clip loss with } A = a\,\phi(\xi), \quad \xi = \frac{\bar R - \mu_K}{\sigma_K}",
        "Some updates are harmful and you can see it in the next rewards.",
        "Above GRPO in all eight seeds with harmful updates: the gain comes from repeating helpful ones. "
        "On stale data: no difference.",
    ),
    "r2vpo": Card(
        r"L = -rA + \lambda (r - 1)^2, \quad \lambda: \; \overline{(r-1)^2} \le \delta",
        "You want a soft trust region, and to reuse old answers.",
        "Keeps its entropy longer than GRPO (1.04 compared with 0.18). Stable with stale data: confirmed in part.",
    ),
    "tppo": Card(
        r"\delta_t = r_t + \gamma V_{t+1} - V_t, \quad V_{T+1} = V_T \text{ if unfinished}",
        "Long answers that are generated in windows over several steps.",
    ),
    # ------------------------------------------------------------------------------------- preferences
    "dpo": Card(rf"L = -\log\sigma(u), \quad {_U}", "Pairs of answers and a reference model. The first one to try."),
    "conservative_dpo": Card(
        r"L = -(1-e)\log\sigma(u) - e\log\sigma(-u)", "Some labels are wrong, at a rate e that you know."
    ),
    "robust_dpo": Card(
        r"L = \frac{-(1-e)\log\sigma(u) + e\log\sigma(-u)}{1 - 2e}", "As conservative DPO, with an unbiased estimate."
    ),
    "slic": Card(r"L = \max(0, 1 - u)", "You want no gradient on pairs that are already separated."),
    "ipo": Card(
        r"L = \left(\frac{u}{\beta} - \frac{1}{2\beta}\right)^2, \quad \text{log-ratios per token}",
        "DPO overfits pairs that are nearly certain.",
    ),
    "ipo_sum": Card(r"L = \left(\frac{u}{\beta} - \frac{1}{2\beta}\right)^2", "The formula of the paper, with sums."),
    "dpo_norm": Card(r"L = -\log\sigma(u), \quad \text{log-ratios per token}", "DPO prefers long answers."),
    "exo_pair": Card(
        r"L = \operatorname{KL}\left((\sigma(u), \sigma(-u)) \,\|\, (1-e, e)\right)",
        "You want the reverse KL to the labels.",
    ),
    "discopop": Card(
        r"L = (1-m)\left(-\log\sigma(u)\right) + m e^{-u}, \quad m = \sigma(u/\tau)",
        "A loss found by search, to compare with.",
    ),
    "wpo": Card(r"L = -w \log\sigma(u), \quad w = \text{likelihood of the pair}", "Pairs come from another model."),
    "ld_dpo": Card(
        r"\log\pi = \sum_{t \le n} \log\pi(y_t) + \alpha \sum_{t > n} \log\pi(y_t), \quad n = \min(T_w, T_l)",
        "Long answers win because of their length.",
    ),
    "f_dpo": Card(
        r"L = -\log\sigma\left(\beta f'(\rho_w) - \beta f'(\rho_l)\right)",
        "You want another divergence than the reverse KL.",
    ),
    "apo_zero": Card(
        r"L = (1 - \sigma(\beta\rho_w)) + \sigma(\beta\rho_l)", "Chosen answers are better than the model."
    ),
    "apo_down": Card(
        r"L = \sigma(\beta\rho_w) + \left(1 - \sigma(\beta(\rho_w - \rho_l))\right)",
        "Chosen answers are worse than the model.",
    ),
    "nca_pair": Card(
        r"L = -\log\sigma(\beta\rho_w) - \frac{1}{2}\log\sigma(-\beta\rho_w) - \frac{1}{2}\log\sigma(-\beta\rho_l)",
        "The likelihood of the chosen answer must not fall.",
    ),
    "sppo_hard": Card(
        r"L = \left(\rho_w - \frac{1}{2\beta}\right)^2 + \left(\rho_l + \frac{1}{2\beta}\right)^2",
        "Self-play with a judge.",
    ),
    "aot": Card(
        r"L = \overline{\ell\left(u_{(i)} - u^{ref}_{(i)}\right)}, \quad \text{both sorted over the batch}",
        "The whole distribution of margins should improve.",
    ),
    "aot_unpaired": Card(
        r"L = \overline{\ell\left(\rho_{w,(i)} - \rho_{l,(i)}\right)}, \quad \text{both sorted over the batch}",
        "As `aot`, without pairs.",
    ),
    "simpo": Card(
        r"L = -\log\sigma\left(\beta\left(\overline{\log\pi(y_w)} - \overline{\log\pi(y_l)}\right) - \gamma\right)",
        "You have no memory for a reference model.",
    ),
    "cpo": Card(r"L = -\log\sigma(u_{\text{noref}}) - \overline{\log\pi(y_w)}", "Translation, or good chosen answers."),
    "rpo": Card(r"L = -\log\sigma(u) - \eta\beta\log\pi(y_w)", "DPO over-optimises an imperfect preference model."),
    "rpo_mean": Card(r"L = -\log\sigma(u) - \eta\,\overline{\log\pi(y_w)}", "As RPO, independent of the length."),
    "hpl": Card(
        r"L = \sum_{\text{level}} L_{\text{DPO}}^{level} - \overline{\log\pi(y_w)}",
        "Agents with trajectories, steps and groups.",
    ),
    "aries": Card(
        r"L = L_{\text{DPO}}(\text{answer}) + c\,L_{\text{DPO}}(\text{refinement})",
        "The model should answer well and refine well.",
    ),
    "bco_pair": Card(
        r"L = -\log\sigma(\beta\rho_w - d) - \log\sigma(d - \beta\rho_l)", "Labels are thumbs up and down."
    ),
    "orpo": Card(
        r"L = -a_w - \lambda\log\sigma\left(\log\frac{e^{a_w}}{1-e^{a_w}} - \log\frac{e^{a_l}}{1-e^{a_l}}\right), "
        r"\quad a = \overline{\log\pi(y)}",
        "Fine-tuning and preference learning in one stage, without a reference.",
    ),
    "kto": Card(
        r"L = \lambda_D\left(1 - \sigma(\beta(\rho - z))\right) \text{ or } "
        r"\lambda_U\left(1 - \sigma(\beta(z - \rho))\right)",
        "Single answers with a good or bad label, no pairs.",
    ),
    "seppo": Card(
        r"L = L_{\text{pair}}\left(y_w, y_{\text{earlier}}\right), \quad "
        r"\text{with a sign by an anchor test for } y_{\text{earlier}}",
        "You have chosen answers only; an earlier checkpoint gives the other side.",
    ),
}


def page(kinds: tuple[str, ...] = ("policy", "preference")) -> str:
    """Return the sections of docs/gallery.md: one per method that has a card."""
    lines: list[str] = []
    for kind in kinds:
        lines += [f"## {KINDS[kind]}", ""]
        for name, one in ENTRIES.items():
            if one.kind == kind and name in CARDS:
                lines += [*_section(one, CARDS[name]), ""]
    return "\n".join(lines).rstrip()


def _section(one: Entry, card: Card) -> list[str]:
    text = one.summary[0].upper() + one.summary[1:]
    lines = [f"### {one.name}", "", f"{_escaped(text)}. Claim: {one.label}. Source: {_escaped(one.source)}."]
    if one.differs:
        lines += ["", _escaped(one.differs)]
    lines += ["", f"$$\n{card.formula}\n$$", "", f"**When to use:** {card.when}"]
    lines += ["", f"**Presets:** {_presets(one)}"]
    lines += ["", f"**Our study:** {card.study or 'not tested.'}"]
    return lines


def _presets(one: Entry) -> str:
    if not one.presets:
        return f'`make("{one.name}")` has the defaults of the source.'
    return "; ".join(f"`{name}` ({_escaped(source)})" for name, (_, source) in one.presets.items()) + "."


def _escaped(text: str) -> str:
    """Return text in which Markdown and the dollar sign have no meaning, except inside code."""
    parts = text.split("`")  # every second part is code
    return "`".join(
        part if i % 2 else "".join(f"\\{c}" if c in "*_<|$" else c for c in part) for i, part in enumerate(parts)
    )
