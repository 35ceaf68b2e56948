"""Losses of offline preference optimization: DPO and its variants, each one a pure function.

Where DPO comes from (arXiv:2305.18290v3, with the paper's equation numbers):

    eq. 3   max_π  E_x E_{y∼π(·|x)} [r(x, y)] − β KL(π(·|x) ‖ π_ref(·|x))
            The goal: answers of high reward r from a policy π that stays close to π_ref.
    eq. 4   π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x),   Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β)
            The optimum. Z(x) is a sum over all answers, far too many for a language model.
    eq. 5   r(x, y) = β log(π*(y|x) / π_ref(y|x)) + β log Z(x)
            Eq. 4 solved for r: the reward in terms of the policy that is optimal for it.
    eq. 6   p(y_w ≻ y_l | x) = σ(r(x, y_w) − r(x, y_l)) = σ(βh)
            Bradley-Terry: people prefer y_w with this probability. Both answers have the same
            prompt x, so β log Z(x) cancels, and h is the difference of the two log-ratios.
    eq. 7   L = −E[log σ(βh)]
            Maximum likelihood on the labels. The policy that is trained takes the place of π*.
            No reward model is trained and no answer is sampled. This is `sigmoid`.

Symbols, the same in every docstring (B pairs; x a prompt, y_w its chosen, y_l its rejected answer):

    w, l      log π(y_w|x), log π(y_l|x)  policy_chosen_logps, policy_rejected_logps: SUMS over the
                                          scored tokens of the answer
    w°, l°    the same under π_ref        ref_chosen_logps, ref_rejected_logps: no gradient
    n_w, n_l  numbers of scored tokens    chosen_lengths, rejected_lengths: answer and EOS are
                                          scored, prompt and padding are not
    a, b      w − w°, l − l°              the log-ratios; r_w = βa and r_l = βb are the implicit
                                          rewards
    h         a − b                       the margin: how much more strongly π prefers y_w to y_l
                                          than π_ref does
    w̄, l̄      w/n_w, l/n_l                averages per token; ā, b̄ and h̄ are the log-ratios and
                                          the margin of averages
    n̄         mean of n_w                 over the pairs of an optimizer step, so that the mean of
                                          −w/n̄ is the negative log-likelihood per chosen token
    β         beta                        a larger β keeps π closer to π_ref; without a reference,
                                          and in `alpha_dpo`, it is the scale of the log-probs
                                          (in `orpo` the weight of the preference term)
    ε         label_smoothing             the share of labels believed to be flipped
    σ, sp     sigmoid, softplus           sp(x) = log(1 + eˣ) = −log σ(−x), numerically stable at
                                          any x; log(sigmoid(x)) is not

Losses of single answers with a label take (N,) tensors. Losses of lists take (B, K) tensors, for
answers y_1, ..., y_K to a prompt, the best one first:

    ℓ, ℓ_k    log π(y|x), log π(y_k|x)    policy_logps; ref_logps are the same under π_ref
    r, r_k    β (ℓ − ℓ°), β (ℓ_k − ℓ°_k)  the implicit rewards
    s_k       a score of y_k              scores
              True for a good answer      labels. L_D is the loss of a good (desirable) answer, L_U
                                          that of a bad (undesirable) one
              False where a list has      mask. Lists of fewer answers than K are padded. Padding
              no answer                   gets zero gradient, whatever its values are

Example: w = −8, l = −13, w° = −10, l° = −12 and β = 0.5 give a = 2, b = −1, h = 3 and the DPO loss
−log σ(1.5) = 0.2014.

    python losses.py                          # print a table of the losses
    python losses.py --plot losses.png        # draw each margin loss and its gradient
    from losses import sigmoid                # use one loss
    LOSSES["sigmoid"] is sigmoid              # look it up by its name
    find("sigmoid:0.8,bco_pair:0.2,sft:1")    # make a weighted sum, as --loss takes it

Conventions. All tensors of pairs are (B,), and so is the result: one loss per pair (per answer with
a label (N,), per list (B,)), except that `aot` and `aot_unpaired` give one per quantile, and
`dr_dpo` gives every pair the loss of the batch. No other
loss reduces. None logs or stores anything, or changes a tensor in place. A loss that averages over
tokens divides by the lengths in its own body. Tensors come first, hyper-parameters are
keyword-only. Other files read the signature: a `ref_*` argument makes the reference model run, a
keyword-only argument becomes a flag of train.py, and a positional argument with a default is
optional for the caller: `delta`, `gap_mean`, `gap_std`, `mean_chosen_length` and `kl` are numbers
of the whole optimizer step. The first three are state: the function that `@loss` names as `update`
makes them for the next step.

"Second-hand" marks a fact about a paper that we read in notes or in the documentation of another
library, and neither in the paper nor in the authors' code.

The `@loss` line gives the range of each hyper-parameter; a value out of range raises a ValueError
that names the parameter. Properties that the signature cannot express are tags in the same line:

    margin   the log-probs enter through one margin alone, so zeros may replace the reference
             (--reference_free). If it is a margin of sums, a constant per prompt cancels, so an
             f-divergence score, which is known up to such a constant, may replace the log-ratio
             (f_divergence_score)
    average  the margin, or each of the two rewards, is an average per token
    batch    the loss of a pair depends on the other pairs of the batch, by more than n̄
    one_best a loss of lists without scores that reads which answer is the best, and no order of the
             others

To copy a function into another project, leave out its `@loss` line, and copy `capped_exp` too if
the body calls it. The copy needs only torch, and does not check ranges. The lines that compute a, b
and h are repeated in every loss, so that each function can be copied alone.
"""
import registry  # first, see errors.py
import torch
import torch.nn.functional as F

from registry import (  # noqa: F401  (other files import these from here: LOSSES is filled here)
    LOSSES,
    compares_answers,
    find,
    hyperparameters,
    kind_of,
    loss,
    needs_kl,
    needs_of,
    needs_ordered_scores,
    needs_reference,
    needs_rejected,
    needs_scores,
    one_row,
    sides_of,
    start_state,
    tensor_arguments,
)

# --------------------------------------------------------------------------------------------------
# Margin losses: the log-probs enter through h alone. The chosen and the rejected answer get
# gradients of the same size and opposite sign, and a constant added to both log-probs of a prompt
# changes nothing. `ipo` and `sigmoid_norm` take the margin of averages: there the sizes are as
# 1/n_w to 1/n_l, and only a constant per token changes nothing. These losses say which answer to
# prefer, not how probable either answer should be, so both probabilities may fall while h rises.
# They differ in the shape of the curve: how hard they push pairs that are wrong, right, or very
# right.
# --------------------------------------------------------------------------------------------------

@loss("margin", beta="> 0", label_smoothing="[0, 0.5)")
def sigmoid(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, label_smoothing=0.0,
):
    """DPO: logistic regression on the margin of implicit rewards. With label smoothing it is cDPO.

    Paper      Direct Preference Optimization, arXiv:2305.18290v3, eq. 7
               cDPO: A note on DPO with noisy preferences, Mitchell 2023, ericmitchell.ai/cdpo.pdf
    Formula    L = −(1−ε) log σ(βh) − ε log σ(−βh)        = −log σ(βh) + ε βh
    Gradient   ∂L/∂w = −β (σ(−βh) − ε) = −∂L/∂l. The weight σ(−βh) says how wrong the order of the
               implicit rewards still is. It never reaches 0, so without smoothing h grows forever
               on pairs that can be separated. With smoothing the gradient is reversed where
               σ(βh) > 1 − ε, and h settles at log((1−ε)/ε) / β.
    Args       four (B,) log-probs; beta > 0 (paper 0.1; 0.5 for summaries); label_smoothing
               in [0, 0.5)
    Elsewhere  TRL >= 0.29 and Liger ignore label smoothing here, without a warning. Some tutorials
               feed per-token averages into eq. 7, which is the formula of `sigmoid_norm` with
               another scale of β. We follow the paper: sums.
    """
    a = policy_chosen_logps - ref_chosen_logps      # (B,) log-ratio of y_w
    b = policy_rejected_logps - ref_rejected_logps  # (B,) log-ratio of y_l
    h = a - b                                       # (B,) eq. 6: here β log Z(x) cancels
    eps = label_smoothing
    z = beta * h
    correct = F.softplus(-z)  # −log σ(z): eq. 7, if the label is correct
    flipped = F.softplus(z)   # −log σ(−z): if it is flipped
    return (1 - eps) * correct + eps * flipped


@loss("margin", beta="> 0", label_smoothing="[0, 0.5)")
def robust(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, label_smoothing=0.1,
):
    """Robust DPO: an unbiased estimate, from noisy labels, of the DPO loss on clean labels.

    Paper      Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv:2403.00409
    Formula    L = [ −(1−ε) log σ(βh) + ε log σ(−βh) ] / (1−2ε)        = −log σ(βh) − ε/(1−2ε) βh
    Gradient   ∂L/∂w = −β [ (1−ε) σ(−βh) + ε σ(βh) ] / (1−2ε) = −∂L/∂l. Its size falls to βε/(1−2ε)
               and no further: right pairs always get a gradient, the loss is unbounded below, and a
               negative value is no error.
    Args       four (B,) log-probs; beta > 0; label_smoothing in [0, 0.5) (second-hand:
               0.1 in the paper)
    Elsewhere  Often confused with cDPO (`sigmoid` with label smoothing), whose βh term has the
               opposite sign: cDPO is cautious where labels may be flipped, robust DPO undoes the
               flips on average. TRL 0.13 returns ±inf at ε = 0.5 and changes the sign beyond; we
               refuse both.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    eps = label_smoothing
    z = beta * h
    correct = F.softplus(-z)
    flipped = F.softplus(z)
    return ((1 - eps) * correct - eps * flipped) / (1 - 2 * eps)


@loss("margin", beta="> 0")
def hinge(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """Hinge on the margin of implicit rewards: DPO with the loss of a support vector machine.

    Paper      Statistical Rejection Sampling Improves Preference Optimization (RSO),
               arXiv:2309.06657, Sec. 3.1, eq. 10
               The paper calls it "hinge-norm", and our β is its γ. The hinge comes from SLiC-HF,
               which has no reference: see `slic`.
    Formula    L = max(0, 1 − βh)
    Gradient   ∂L/∂w = −β = −∂L/∂l while βh < 1, exactly 0 beyond: a pair whose margin is large
               enough gets no gradient.
    Args       four (B,) log-probs; beta > 0 (paper 0.05): 1/β is the margin to reach, in nats
    Elsewhere  The same in TRL (`hinge`) and torchtune (`RSOLoss`, which calls β gamma).
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    return F.relu(1 - beta * h)


@loss("margin", beta="> 0", label_smoothing="(0, 0.5)")
def exo_pair(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, label_smoothing=1e-3,
):
    """EXO: the reverse KL, from the policy's preference to the labels; DPO is the forward KL.

    Paper      Towards Efficient Exact Optimization of Language Model Alignment (EXO),
               arXiv:2402.00856
    Formula    L = KL( (σ(z), σ(−z)) ‖ (1−ε, ε) ),        z = βh
                 = σ(z) log[σ(z)/(1−ε)] + σ(−z) log[σ(−z)/ε]
    Gradient   ∂L/∂w = β σ(z) σ(−z) (z − log((1−ε)/ε)) = −∂L/∂l. It is 0 where the policy is as
               confident as the labels, and against y_w beyond. It also vanishes for pairs that are
               very wrong, which a mode-seeking divergence ignores; DPO pushes such pairs
               hardest.
    Args       four (B,) log-probs; beta > 0 (authors' scripts 0.5 for dialogue and summaries, 0.1
               for IMDb); label_smoothing in (0, 0.5) (1e-3 as in TRL; at 0 the loss would be +inf)
    Elsewhere  The authors' code uses unnormalized targets (0, −10) in log space, that is ε = e⁻¹⁰
               without the log(1−ε) term, and never reads its own smoothing flag. TRL 0.9.6 to 0.28
               changes ε = 0 to 1e-3 and stores that value; we refuse 0.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    log_p = F.logsigmoid(beta * h)   # the policy's log-probability that y_w is better
    log_q = F.logsigmoid(-beta * h)  # and that y_l is better
    labels = torch.tensor([1 - label_smoothing, label_smoothing], dtype=h.dtype)
    log_correct, log_flipped = torch.log(labels)
    kl_correct = log_p.exp() * (log_p - log_correct)
    kl_flipped = log_q.exp() * (log_q - log_flipped)
    return kl_correct + kl_flipped


@loss("margin", beta="> 0", discopop_tau="> 0")
def discopop(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.05, discopop_tau=0.05,
):
    """DiscoPOP, the log-ratio modulated loss: logistic on wrong pairs, exponential on right pairs.

    Paper      Discovering Preference Optimization Algorithms with and for Large Language Models,
               arXiv:2406.08414, Sec. 6.1, eq. 5
               A language model proposed the loss. Eq. 4 as printed has a wrong sign; eq. 5 is
               right.
    Formula    L = (1 − m) sp(−z) + m e^(−z),        m = σ(z/τ), z = βh
    Gradient   ∂L/∂w = β L′(z) = −∂L/∂l,
               L′(z) = −(1−m) σ(−z) − m e^(−z) + m(1−m)/τ [e^(−z) − sp(−z)]. The loss is not
               convex: with τ = 0.05 it has a local minimum at z = −0.119 and a maximum at
               z = 0.072. Where π = π_ref, L′(0) = +0.784: it pushes AGAINST y_w. A single pair
               that starts there ends in the minimum, with h < 0; only a pair that others move
               beyond the maximum is pushed on.
    Args       four (B,) log-probs; beta > 0 (paper 0.05); discopop_tau > 0 (paper 0.05), the width
               of the blend
    Elsewhere  TRL and the authors multiply e^(−z) by m, which in fp32 is inf · 0 = NaN once
               z < −88. Here the product is one exponential. For τ > 1 its true value grows as
               e^(|z|(1−1/τ)), which `capped_exp` extends linearly beyond its cap.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    z = beta * h
    tau = discopop_tau
    log_product = -z + F.logsigmoid(z / tau)  # log(m e^(−z))
    logistic = torch.sigmoid(-z / tau) * F.softplus(-z)
    return logistic + capped_exp(log_product)


@loss("margin", "average", beta="> 0")
def ipo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_lengths, rejected_lengths, *, beta=0.1,
):
    """IPO: regress the margin onto a fixed target, not to infinity. PER-TOKEN AVERAGES, not sums.

    Paper      A General Theoretical Paradigm to Understand Learning from Human Preferences,
               arXiv:2310.12036v2, eq. 17
               Its τ is our β.
    Formula    L = (h̄ − 1/(2τ))²,        h̄ = (w − w°)/n_w − (l − l°)/n_l
    Gradient   ∂L/∂w = 2 (h̄ − 1/(2τ)) / n_w, ∂L/∂l = −2 (h̄ − 1/(2τ)) / n_l. It grows with the
               error, and is against y_w beyond the target; the gradient of DPO never is.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0. β sets the target alone and
               does not scale h̄.
    Elsewhere  The paper prints the summed log-ratio and says nothing of averages. Its authors, when
               asked, said that averages are meant: huggingface.co/blog/pref-tuning and a comment
               in TRL's code report it.
               TRL >= 0.7.11, LLaMA-Factory and we average; the DPO authors' repository, OpenRLHF
               and TRL <= 0.7.10 sum. For the summed form pass lengths of one. HALOs counts the
               tokens whose log-ratio is not 0, which gives 0/0 before the first step.
    """
    a = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths        # ā
    b = (policy_rejected_logps - ref_rejected_logps) / rejected_lengths  # b̄
    h = a - b
    tau = beta
    return (h - 1 / (2 * tau)) ** 2  # eq. 17


@loss("margin", "average", beta="> 0")
def sigmoid_norm(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_lengths, rejected_lengths, *, beta=5.0,
):
    """Length-normalized DPO: `sigmoid` on per-token averages, so a long answer gets no larger step.

    Paper      Tülu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv:2411.15124,
               Sec. 5.1.2, eq. 6
    Formula    L = −log σ(βh̄),        h̄ = (w − w°)/n_w − (l − l°)/n_l
    Gradient   ∂L/∂w = −β σ(−βh̄) / n_w, ∂L/∂l = β σ(−βh̄) / n_l: each token of the shorter answer
               gets the larger gradient.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0 (paper 5, Table 20). For answers
               of n tokens β = 5 acts as β = 5/n does in `sigmoid`.
    Elsewhere  open-instruct calls it dpo_norm. TRL's documentation cites Sec. 4.3 for it. Two other
               corrections for length: `rdpo` adds a term, --ld_alpha weights tokens.
    """
    a = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths        # ā
    b = (policy_rejected_logps - ref_rejected_logps) / rejected_lengths  # b̄
    h = a - b
    return F.softplus(-beta * h)


@loss("margin", beta="> 0", rdpo_alpha=">= 0")
def rdpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_lengths, rejected_lengths, *, beta=0.1, rdpo_alpha=0.01,
):
    """R-DPO: a chosen answer that is longer is taken to be chosen partly because it is longer.

    Paper      Disentangling Length from Quality in Direct Preference Optimization, arXiv:2403.19159
    Formula    L = −log σ(βh + α (n_w − n_l))
    Gradient   ∂L/∂w = −β σ(−(βh + α (n_w − n_l))) = −∂L/∂l: pairs whose chosen answer is the longer
               one get a smaller gradient.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0; rdpo_alpha >= 0, per token
               (0.005 to 0.05 in the scripts named below)
    Elsewhere  The sign is that of github.com/orangese/dpo-length-experiments, whose scripts run in
               the first author's folders, and of SimPO's Tables 3 and 7. One survey prints a
               minus, against its own derivation. SamPO's code calls α lenN.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    length_term = rdpo_alpha * (chosen_lengths - rejected_lengths).to(h.dtype)
    return F.softplus(-(beta * h + length_term))


@loss("margin", chosen_scores="> rejected_scores", beta="> 0", odpo_alpha=">= 0")
def odpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_scores, rejected_scores, *, beta=0.1, odpo_alpha=1.0,
):
    """ODPO: DPO with an offset, so that an answer that is much better must win by more.

    Paper      Direct Preference Optimization with an Offset, arXiv:2402.10571
    Formula    L = −log σ(βh − Δ),        Δ = α log(s_w − s_l)
    Gradient   ∂L/∂w = −β σ(Δ − βh) = −∂L/∂l: the gradient of DPO at a margin that is smaller by Δ.
    Args       four (B,) log-probs; chosen_scores > rejected_scores, both (B,): s_w and s_l, a score
               of each answer (checked on CPU tensors). Their scale matters: c times the scores are
               α log c more offset. beta > 0; odpo_alpha >= 0 (authors' code 1, sentiment task 0.5;
               0 is DPO)
    Elsewhere  The authors' code can also take the log of the ratio of the two scores.
               turbo-alignment takes Δ itself.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    offset = odpo_alpha * torch.log(chosen_scores - rejected_scores)  # Δ
    return F.softplus(offset - beta * h)


@loss("margin", beta="> 0", margin_kappa=">= 0")
def score_margin(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_scores, rejected_scores, *, beta=0.1, margin_kappa=1.0,
):
    """DPO with a linear margin: the implicit rewards must differ by more than the scores differ.

    Paper      Llama 2: Open Foundation and Fine-Tuned Chat Models, arXiv:2307.09288, which adds a
               margin to the loss of its reward models; here it is added to DPO
    Formula    L = −log σ(βh − κ (s_w − s_l))
    Gradient   ∂L/∂w = −β σ(κ (s_w − s_l) − βh) = −∂L/∂l: the gradient of DPO at a margin that is
               smaller by κ (s_w − s_l) / β. It never reaches 0. A pair whose rejected answer has
               the better score has a negative margin, and is pushed less than by DPO.
    Args       four (B,) log-probs; chosen_scores and rejected_scores, both (B,), of any order;
               beta > 0; margin_kappa >= 0 (0 is DPO)
    Elsewhere  MODPO (arXiv:2310.03708) is this loss: β of its code over w_0 is our β, w_1/w_0 is
               our κ, and the scores are those of another objective. turbo-alignment's margin loss
               has κ too. `odpo` takes the log of the difference; --loss rpo_bwd_kl takes the
               difference as a target, where the gradient ends.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    target_margin = margin_kappa * (chosen_scores - rejected_scores)
    return F.softplus(target_margin - beta * h)


@loss("margin", beta="> 0", rpo_eta=">= 0")
def rpo_sq(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_scores, rejected_scores, *, beta=0.2, rpo_eta=1.0,
):
    """RPO, squared: regress the difference of implicit rewards onto the difference of scores.

    Paper      Reward-aware Preference Optimization: A Unified Mathematical Framework for Model
               Alignment, arXiv:2502.00203
    Formula    L = (z − g)²,        z = βh, g = η (s_w − s_l)
    Gradient   ∂L/∂w = 2β (z − g) = −∂L/∂l. It grows with the error, and is against y_w beyond the
               target. Equal scores ask for z = 0.
    Args       four (B,) log-probs; chosen_scores and rejected_scores, both (B,), on the scale of
               implicit rewards; beta > 0 (NeMo-Aligner 0.2); rpo_eta >= 0 (NeMo-Aligner 1), the
               scale of the scores
    Elsewhere  NeMo-Aligner's rpo_sq. Its data without scores gets default scores; ours is an error.
               With g = 1/2 in every pair it is β² times IPO's loss of summed log-probs. Other
               methods have the name RPO too: arXiv:2404.19733 and arXiv:2405.16436 add a
               likelihood to DPO.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    target = rpo_eta * (chosen_scores - rejected_scores)  # g
    return (beta * h - target) ** 2


@loss("margin", beta="> 0", rpo_eta=">= 0")
def rpo_bwd_kl(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_scores, rejected_scores, *, beta=0.2, rpo_eta=1.0,
):
    """RPO, "backward" KL: DPO with soft labels, as confident as the scores are apart.

    NeMo-Aligner calls it backward. The target comes FIRST, which most texts call the forward KL.

    Paper      Nemotron-4 340B Technical Report, arXiv:2406.11704; the framework is
               arXiv:2502.00203
    Formula    L = KL( (σ(g), σ(−g)) ‖ (σ(z), σ(−z)) ),        z = βh, g = η (s_w − s_l)
    Gradient   ∂L/∂w = β (σ(z) − σ(g)) = −∂L/∂l: 0 where the policy is as confident as the scores,
               against y_w beyond, and never larger than β.
    Args       four (B,) log-probs; chosen_scores and rejected_scores, both (B,), in units of
               log-odds after rpo_eta; beta > 0 (NeMo-Aligner 0.2); rpo_eta >= 0 (NeMo-Aligner 1)
    Elsewhere  NeMo-Aligner's rpo_bwd_kl. cDPO (`sigmoid`) with ε = σ(−g) for each pair has the same
               gradient; its loss is larger by the entropy of the labels. As η grows it becomes DPO
               where s_w > s_l.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    z = beta * (a - b)
    g = rpo_eta * (chosen_scores - rejected_scores)
    log_p, log_q = F.logsigmoid(g), F.logsigmoid(-g)  # the labels
    kl_chosen = log_p.exp() * (log_p - F.logsigmoid(z))
    kl_rejected = log_q.exp() * (log_q - F.logsigmoid(-z))
    return kl_chosen + kl_rejected


@loss("margin", beta="> 0", rpo_eta=">= 0")
def rpo_fwd_kl(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_scores, rejected_scores, *, beta=0.2, rpo_eta=1.0,
):
    """RPO, "forward" KL: EXO with soft labels, as confident as the scores are apart.

    NeMo-Aligner calls it forward. The policy comes FIRST, which most texts call the reverse KL.

    Paper      Reward-aware Preference Optimization: A Unified Mathematical Framework for Model
               Alignment, arXiv:2502.00203
    Formula    L = KL( (σ(z), σ(−z)) ‖ (σ(g), σ(−g)) ),        z = βh, g = η (s_w − s_l)
    Gradient   ∂L/∂w = β σ(z) σ(−z) (z − g) = −∂L/∂l: 0 where the policy is as confident as the
               scores, against y_w beyond. It vanishes for pairs that are very wrong.
    Args       four (B,) log-probs; chosen_scores and rejected_scores, both (B,), in units of
               log-odds after rpo_eta; beta > 0 (NeMo-Aligner 0.2); rpo_eta >= 0 (NeMo-Aligner 1)
    Elsewhere  NeMo-Aligner's rpo_fwd_kl. It is `exo_pair` with ε = σ(−g) for each pair.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    z = beta * (a - b)
    g = rpo_eta * (chosen_scores - rejected_scores)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)  # the policy's preference
    kl_chosen = log_p.exp() * (log_p - F.logsigmoid(g))
    kl_rejected = log_q.exp() * (log_q - F.logsigmoid(-g))
    return kl_chosen + kl_rejected


# --------------------------------------------------------------------------------------------------
# Reward losses: functions of the two log-ratios a and b (or of the implicit rewards r_w = βa and
# r_l = βb), not of their difference alone. Most of them say what the probability of each answer
# should do, relative to π_ref, and keep the chosen answer probable where a margin loss would let
# its probability fall. Not so `apo_down`, which lowers both, nor `dpo_shift` and `chipo`, which
# still compare the two answers, so that both may fall.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0")
def nca_pair(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """NCA: noise contrastive estimation. y_w is data (and half of the noise), y_l is noise.

    Paper      Noise Contrastive Alignment of Language Models with Explicit Rewards,
               arXiv:2402.05369; the formula is that of the authors' code for two answers
    Formula    L = −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)
    Gradient   ∂L/∂w = −β (1 − (3/2) σ(r_w)), ∂L/∂l = (β/2) σ(r_l): the gradient of each answer
               depends on its own reward alone. The minimum in r_w is finite, log 2, so
               the likelihood of y_w does not fall without bound.
    Args       four (B,) log-probs; beta > 0 (authors' README 0.01; second-hand: 0.1 for
               UltraInteract in the paper's appendix C)
    Elsewhere  The same in the authors' code and TRL. `bco_pair` with delta = 0 counts y_w as no
               part of the noise and y_l as all of it.
    """
    r_w = beta * (policy_chosen_logps - ref_chosen_logps)
    r_l = beta * (policy_rejected_logps - ref_rejected_logps)
    return F.softplus(-r_w) + 0.5 * F.softplus(r_w) + 0.5 * F.softplus(r_l)


def update_delta(
    delta: float, chosen_reward: float, rejected_reward: float, decay: float = 0.9,
) -> float:
    """The δ of BCO for the next step: a moving average of ½ (mean r_w + mean r_l), BCO's eq. 7.

    The average is exponential. train.py calls this function after each step with the means over
    all pairs of the step. The decay is our choice, because we found no stated value; 0.9 averages
    over about ten steps.
    """
    return decay * delta + (1 - decay) * (chosen_reward + rejected_reward) / 2


def update_bco(state: dict, means: dict, beta: float) -> dict:
    """The state of `bco_pair` for the next step: see `update_delta`."""
    delta = update_delta(state["delta"], means["rewards/chosen"], means["rewards/rejected"])
    return {"delta": delta}


@loss(update=update_bco, beta="> 0")
def bco_pair(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, delta=0.0,
    *, beta=0.1,
):
    """BCO: a binary classifier of good and bad answers, whose logit is the implicit reward.

    Paper      Binary Classifier Optimization for Large Language Model Alignment,
               arXiv:2404.04656 (ACL 2025), eq. 8; δ is eq. 7
    Formula    L = −log σ(r_w − δ) − log σ(−(r_l − δ))
    Gradient   ∂L/∂w = −β σ(−(r_w − δ)), ∂L/∂l = β σ(r_l − δ): the gradient of each answer depends
               on its own reward, relative to the shift δ. δ gets no gradient. For any δ,
               L > −log σ(βh): the loss is an upper bound of DPO's.
    Args       four (B,) log-probs; delta, a number: the running mean of the rewards, which
               `update_delta` computes; beta > 0 (paper 0.1)
    Elsewhere  TRL <= 0.28 averages all batches since the start with equal weights, updates the mean
               before it is used, and updates it in evaluation too. TRL >= 0.29 and Liger leave δ
               out, which is the paper's "BCE" baseline and not BCO.
    """
    r_w = beta * (policy_chosen_logps - ref_chosen_logps)
    r_l = beta * (policy_rejected_logps - ref_rejected_logps)
    if torch.is_tensor(delta):  # a number stays one: copying it would make a GPU wait
        delta = delta.detach()
    return F.softplus(-(r_w - delta)) + F.softplus(r_l - delta)  # eq. 8


@loss(beta="> 0")
def sppo_hard(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.001,
):
    """SPPO on fixed pairs: regress the log-ratios of y_w and y_l onto η/2 and −η/2.

    Paper      Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675v5,
               Sec. 4.5, eq. 4.12
               Here P(y_w wins) = 1 and P(y_l wins) = 0. Its η is our 1/β. The targets η (P − ½) are
               those of one step of multiplicative weights towards the Nash equilibrium of a
               two-player game; π_ref is the policy before this step.
    Formula    L = (a − η/2)² + (b + η/2)²
    Gradient   ∂L/∂w = 2 (a − η/2), ∂L/∂l = 2 (b + η/2): each log-ratio has a target of its own, so
               neither can drift.
    Args       four (B,) log-probs; beta > 0 (paper η = 1000, that is 0.001, with the win rates of a
               preference model, PairRM, in place of 1 and 0)
    Elsewhere  TRL is the same, with 0.1 as its default. The authors' code halves the sum and has
               soft win rates.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    eta = 1 / beta
    return (a - eta / 2) ** 2 + (b + eta / 2) ** 2  # eq. 4.12


@loss("batch", beta="> 0")
def kto_pair(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """KTO on pairs: how people value gains and losses, relative to a reference point of the batch.

    Paper      KTO: Model Alignment as Prospect Theoretic Optimization,
               arXiv:2402.01306v4, eq. 8 (eq. 7 in v1), λ = 1 on both sides
    Formula    L = ½ [1 − σ(β(a − z_l))] + ½ [1 − σ(β(z_w − b))],
               z_w = max(0, mean a), z_l = max(0, mean b)
    Gradient   ∂L/∂w = −(β/2) σ(u) σ(−u) at u = β(a − z_l), ∂L/∂l = (β/2) σ(v) σ(−v) at
               v = β(z_w − b). It is largest at u = 0 and v = 0, and vanishes for answers that are
               very good or very bad. z has no gradient: the paper says not to back-propagate
               through it. Contradictory labels of a pair drive h ever further to the side of the
               majority only while z stays at 0; where z rises with h, h settles.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper estimates z from mismatched prompts and answers. The log-probs of pairs
               contain none, so the mean of the OTHER side takes its place, as in TRL 0.7.5 to
               0.9.4, where this loss comes from. Those versions back-propagate through z (twice
               the gradient, for one pair with a, b > 0) and return 2B terms. Ours is half the sum
               of a pair's two terms, so the mean is the same.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    z_w = a.detach().mean().clamp(min=0)
    z_l = b.detach().mean().clamp(min=0)
    chosen = torch.sigmoid(-beta * (a - z_l))  # 1 − σ(x) = σ(−x)
    rejected = torch.sigmoid(-beta * (z_w - b))
    return 0.5 * chosen + 0.5 * rejected


@loss(beta="> 0")
def apo_zero(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """APO-zero: y_w up, y_l down, each anchored at π_ref.

    For chosen answers that are better than the model's own.

    Paper      Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266
    Formula    L = 1 − σ(r_w) + σ(r_l)
    Gradient   ∂L/∂w = −β σ(r_w) σ(−r_w), ∂L/∂l = β σ(r_l) σ(−r_l): always up for y_w and always
               down for y_l, most strongly at the anchor r = 0.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper has no 1. TRL adds it, and so do we, so that the loss lies in (0, 2). The
               gradient is the same.
    """
    r_w = beta * (policy_chosen_logps - ref_chosen_logps)
    r_l = beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(-r_w) + torch.sigmoid(r_l)


@loss(beta="> 0")
def apo_down(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """APO-down: both answers down, y_l further.

    For chosen answers that are worse than the model's own.

    Paper      Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266
    Formula    L = σ(r_w) + 1 − σ(r_w − r_l)
    Gradient   with s(x) = σ(x) σ(−x): ∂L/∂w = β [s(r_w) − s(βh)], ∂L/∂l = β s(βh). To first order
               at π_ref y_w does not move; where |βh| > |r_w|, y_w falls.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper has no 1. TRL adds it, and so do we. The gradient is the same.
    """
    r_w = beta * (policy_chosen_logps - ref_chosen_logps)
    r_l = beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(r_w) + torch.sigmoid(r_l - r_w)


@loss(beta="> 0", dpop_lambda=">= 0")
def dpop(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.3, dpop_lambda=50.0,
):
    """DPO-Positive: DPO with a penalty where the chosen answer is less probable than under π_ref.

    Paper      Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive,
               arXiv:2402.13228
    Formula    L = −log σ(β [h − λ max(0, w° − w)])
    Gradient   with u = β [h − λ max(0, −a)]: ∂L/∂l = β σ(−u), ∂L/∂w = −β σ(−u) (1 + λ) while
               w < w°, and −β σ(−u) otherwise, as in DPO.
    Args       four (B,) log-probs; beta > 0 (second-hand: 0.3 in the paper); dpop_lambda >= 0
               (0 is DPO; second-hand: 50 in the paper, 5 and 500 in an ablation)
    Elsewhere  The authors published no code that we found. SamPO's code has this formula.
               turbo-alignment has λ = 0.1 by default.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    penalty = dpop_lambda * F.relu(-a)
    return F.softplus(-beta * (a - b - penalty))


@loss(beta="> 0", shift_lambda="[0, 1]")
def dpo_shift(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.01, shift_lambda=0.7,
):
    """DPO-Shift: DPO in which the rejected answer counts less, so that the chosen one falls less.

    Paper      DPO-Shift: Shifting the Distribution of Direct Preference Optimization,
               arXiv:2502.07599
    Formula    L = −log σ(β (a − λb))
    Gradient   with u = β (a − λb): ∂L/∂w = −β σ(−u), ∂L/∂l = λβ σ(−u). A token that both answers
               begin with is pushed up by the difference, (1 − λ) β σ(−u); DPO does not move it.
    Args       four (B,) log-probs; beta > 0 (authors' recipes 0.01); shift_lambda in [0, 1]
               (authors' recipes 0.7; 1 is DPO)
    Elsewhere  The authors' code can also change λ linearly during training. λ multiplies the
               reference's log-prob too: with λ on l alone the loss would not begin at log 2. With a
               reference of zeros it is CPL, Contrastive Preference Learning (arXiv:2310.13639),
               whose contrastive bias is our λ.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    return F.softplus(-beta * (a - shift_lambda * b))


@loss(beta="> 0", bpo_alpha="(0, 1]")
def bpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, bpo_alpha=0.3,
):
    """BPO: only the answer that lags behind is trained, so y_l cannot pay for a falling y_w.

    Paper      BPO: Revisiting Preference Modeling in Direct Preference Optimization,
               arXiv:2506.03557
    Formula    L = −log σ(β min(a, −αb))
    Gradient   with u = β min(a, −αb): ∂L/∂w = −β σ(−u) while a < −αb, 0 otherwise;
               ∂L/∂l = αβ σ(−u) while a > −αb, 0 otherwise. At a tie, as at π = π_ref, each side
               gets half of its gradient.
    Args       four (B,) log-probs; beta > 0 (authors' code 0.1); bpo_alpha in (0, 1] (authors'
               code 0.3): y_l has to fall by 1/α nats for each nat that y_w rises
    Elsewhere  The authors' configuration trains a hinge in place of the logistic: `bpo_hinge`.
               Other methods have the name BPO too, such as arXiv:2505.19601.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    balanced = torch.minimum(a, -bpo_alpha * b)
    return F.softplus(-beta * balanced)


@loss(beta="> 0", bpo_alpha="(0, 1]")
def bpo_hinge(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, bpo_alpha=0.3,
):
    """BPO with a hinge: only the answer that lags behind is trained, until both reached a target.

    Paper      BPO: Revisiting Preference Modeling in Direct Preference Optimization,
               arXiv:2506.03557
    Formula    L = max(0, 1 − β min(a, −αb))
    Gradient   with v = min(a, −αb), while βv < 1, and exactly 0 beyond: −β for w if a < −αb, αβ for
               l if a > −αb. At a tie, as at π = π_ref, each side gets half of its gradient.
    Args       four (B,) log-probs; beta > 0 (authors' code 0.1): y_w has to rise by 1/β nats;
               bpo_alpha in (0, 1] (authors' code 0.3): y_l has to fall by 1/(αβ) nats
    Elsewhere  This is what the authors' configuration trains. `bpo` is the logistic form.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    balanced = torch.minimum(a, -bpo_alpha * b)
    return F.relu(1 - beta * balanced)


@loss(beta="> 0", cal_dpo_weight=">= 0")
def cal_dpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, cal_dpo_weight=1.0,
):
    """Cal-DPO: DPO with β = 1, calibrated by pulling the two log-ratios to ±1/(2β).

    Paper      Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment,
               arXiv:2412.14516
    Formula    L = −log σ(h) + c [ (a − 1/(2β))² + (b + 1/(2β))² ]
    Gradient   ∂L/∂w = −σ(−h) + 2c (a − 1/(2β)), ∂L/∂l = σ(−h) + 2c (b + 1/(2β)). At π_ref the
               square has c/β of the gradient of w and DPO 1/2, so with the defaults the squares
               dominate from the start. They keep y_w from falling.
    Args       four (B,) log-probs; beta > 0, which sets the targets and does NOT scale h;
               cal_dpo_weight >= 0, c in the formula (paper 1)
    Elsewhere  The authors' code has c = 0.5 and averages the squares over the batch before it adds
               them to each pair, which does not change the mean. The square terms are `sppo_hard`.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    target = 1 / (2 * beta)
    squares = (a - target) ** 2 + (b + target) ** 2
    return F.softplus(b - a) + cal_dpo_weight * squares


@loss(beta="> 0", chipo_r_max="> 0")
def chipo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.05, chipo_r_max=None,
):
    """χPO: DPO regularized by χ² as well as KL, so answers rare under π_ref stay rare.

    Paper      Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization
               via Chi-Squared Preference Optimization, arXiv:2407.13399, Algorithm 1 (second-hand)
    Formula    L = −log σ(clip(β [φ(u_w) − φ(u_l)], ±2R)),
               φ(u) = u + log u, u_w = eᵃ, u_l = eᵇ
    Gradient   with z = β [φ(u_w) − φ(u_l)]: ∂L/∂w = −β σ(−z) (1 + eᵃ) while |z| < 2R, exactly 0
               beyond; ∂L/∂l = β σ(−z) (1 + eᵇ) while |z| < 2R, exactly 0 beyond. Near π_ref it is
               DPO with 2β. At the optimum π/π_ref grows about linearly with a large reward, and
               not exponentially as in DPO.
    Args       four (B,) log-probs; beta > 0 (second-hand: 0.05 and 0.005 in the paper);
               chipo_r_max > 0, R in the formula: the largest true reward. None: no clip.
    Elsewhere  The authors published no code that we found. Copies that clip each side separately,
               or clamp β·u, are another loss. `capped_exp` extends eᵃ linearly beyond the cap
               (a > 44 in fp32), so that the gradient stays finite and is not lost.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    u_w = capped_exp(a)  # eᵃ = π/π_ref of y_w
    u_l = capped_exp(b)
    z = beta * (a + u_w - b - u_l)
    if chipo_r_max is not None:
        z = z.clamp(-2 * chipo_r_max, 2 * chipo_r_max)
    return F.softplus(-z)


# --------------------------------------------------------------------------------------------------
# Distribution losses: two sorted lists of a whole batch are compared, the policy's margins with the
# reference's (`aot`), or the log-ratios of chosen with those of rejected answers (`aot_unpaired`).
# The first must be larger at every quantile, not in every pair. losses[k] belongs to the k-th
# quantile, so a weight of a pair must not multiply it.
# --------------------------------------------------------------------------------------------------

@loss("batch", beta="> 0", label_smoothing="[0, 0.5)")
def aot(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.01, label_smoothing=0.0,
):
    """AOT, paired: the distribution of the policy's margins w − l must dominate the reference's.

    Paper      Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882
    Formula    L_k = −(1−ε) log σ(β(u_k − v_k)) − ε log σ(−β(u_k − v_k)),
               u = sort(w − l), v = sort(w° − l°)
    Gradient   ∂L_k/∂u_k = −β (σ(−β(u_k − v_k)) − ε), for w of the pair of rank k, and its negative
               for l: the gradient of cDPO, but at the margin u_k − v_k. Each pair is compared with
               the reference's pair of the same rank.
    Args       four (B,) log-probs; beta > 0 (second-hand: 0.01 in the paper); label_smoothing
               in [0, 0.5). The result is in sorted order, not in the order of the pairs. A batch of
               one pair is DPO: the quantiles are only as fine as the batch is large.
    Elsewhere  The same in TRL. `aot` is the paired form everywhere; the name `aot_pair` belongs to
               the unpaired one.
    """
    u = (policy_chosen_logps - policy_rejected_logps).sort().values
    v = (ref_chosen_logps - ref_rejected_logps).sort().values
    eps = label_smoothing
    z = beta * (u - v)
    correct = F.softplus(-z)
    flipped = F.softplus(z)
    return (1 - eps) * correct + eps * flipped


@loss("batch", beta="> 0", label_smoothing="[0, 0.5)")
def aot_unpaired(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.01, label_smoothing=0.0,
):
    """AOT, unpaired: the log-ratios of good answers, as a distribution, must dominate the bad ones.

    Paper      Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882
    Formula    L_k = −(1−ε) log σ(β(u_k − v_k)) − ε log σ(−β(u_k − v_k)),
               u = sort(a), v = sort(b)
    Gradient   ∂L_k/∂u_k = −β (σ(−β(u_k − v_k)) − ε) = −∂L_k/∂v_k: the gradient of cDPO, but at the
               margin u_k − v_k. A good and a bad answer of the same rank are compared, whatever
               their prompts.
    Args       four (B,) log-probs; beta > 0 (second-hand: 0.01 in the paper); label_smoothing
               in [0, 0.5). It does not matter which rejected answer came with which chosen one.
               The result is in sorted order.
    Elsewhere  `aot_pair` in TRL 0.9.6 to 0.28, although it is the unpaired form. Here the name
               `aot_pair` selects this function too.
    """
    u = (policy_chosen_logps - ref_chosen_logps).sort().values
    v = (policy_rejected_logps - ref_rejected_logps).sort().values
    eps = label_smoothing
    z = beta * (u - v)
    correct = F.softplus(-z)
    flipped = F.softplus(z)
    return (1 - eps) * correct + eps * flipped


LOSSES["aot_pair"] = aot_unpaired


# --------------------------------------------------------------------------------------------------
# Adaptive losses: DPO or SimPO whose reference, β, target margin or weight of a pair depends on the
# pair, on the batch, or on the steps before. What adapts gets no gradient, except in `dr_dpo`.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0")
def hypo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
):
    """HyPO: DPO without a reference in the pairs whose order the reference has wrong.

    There the gradient of DPO shrinks as soon as the policy is less wrong than the reference.

    Paper      Mitigating Mismatch within Reference-based Preference Optimization, arXiv:2602.11902
    Formula    L = −log σ(β [(w − l) − max(0, w° − l°)])
    Gradient   with u = β [(w − l) − max(0, w° − l°)]: ∂L/∂w = −β σ(−u) = −∂L/∂l. It is that of DPO
               where w° >= l°, and larger where w° < l°.
    Args       four (B,) log-probs; beta > 0 (the default is DPO's). At π = π_ref the loss is above
               log 2 in the pairs whose order the reference has wrong.
    Elsewhere  The authors published no code that we found; the formula is that of the abstract.
               Reading notes mention a threshold other than 0 and a smooth maximum as options. The
               name also belongs to other methods.
    """
    policy_margin = policy_chosen_logps - policy_rejected_logps
    reference_margin = ref_chosen_logps - ref_rejected_logps
    return F.softplus(-beta * (policy_margin - F.relu(reference_margin)))


def update_gap(state: dict, means: dict, beta: float, decay: float = 0.9) -> dict:
    """The state of `beta_dpo` or `alpha_dpo` for the next step: moving averages of the gaps.

    state   gap_mean, gap_std if the loss takes it, and gap_steps, how many steps they average
    means   over all pairs of the step: rewards/margins, which is β times the gap, and its square if
            the loss takes gap_std

    The authors' code starts its averages from zero, so that they are a tenth of the truth at first.
    Here the first ten steps count equally, and later steps make an exponential average. A spread
    below 1e-4 nats per token is taken for the rounding at π = π_ref: such a step changes no average
    of `alpha_dpo`.
    """
    margin = means["rewards/margins"]
    now = {"gap_mean": margin / beta}
    if "gap_std" in state:
        variance = max(0.0, means["rewards/margins_squared"] - margin ** 2)
        now["gap_std"] = variance ** 0.5 / beta
        if now["gap_std"] < 1e-4:
            return state
    steps = state.get("gap_steps", 0) + 1
    weight = max(1 - decay, 1 / steps)
    averages = {"gap_steps": steps}
    for name in now:
        averages[name] = (1 - weight) * state[name] + weight * now[name]
    return averages


@loss("margin", "batch", update=update_gap, beta="> 0", beta_dpo_a=">= 0")
def beta_dpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    gap_mean=0.0, keep=None, *, beta=0.1, beta_dpo_a=0.6,
):
    """β-DPO: a larger β for a batch whose margins are larger than those of the batches before.

    Paper      β-DPO: Direct Preference Optimization with Dynamic β, arXiv:2407.08639
    Formula    L = −log σ(β_b h),        β_b = max(β [1 + α (mean h − M)], 0.001)
               The mean is over the batch, M is a moving average of it.
    Gradient   ∂L/∂w = −β_b σ(−β_b h) = −∂L/∂l. β_b has no gradient. It has no upper bound: a batch
               whose mean is 5 nats above M has 4 β at α = 0.6.
    Args       four (B,) log-probs; gap_mean, a number: M, which `update_gap` computes; keep (B,):
               1 for the pairs that the mean is over (default all); beta > 0 (authors' code 0.1);
               beta_dpo_a >= 0, α in the formula (authors' README 0.6; 0 is DPO if β >= 0.001)
    Elsewhere  The paper also drops pairs: of each batch it draws some, 80 % in the authors' README,
               and a pair is the more probable the nearer h is to M. For that pass `keep` and
               average the losses of these pairs; train.py keeps all pairs. The authors' code fails
               at π = π_ref, where the probabilities are 0/0. It updates M before it is used, and in
               evaluation too; here M is of the steps before.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    gap = h.detach()
    if keep is None:
        keep = torch.ones_like(gap)
    batch_mean = (keep * gap).sum() / keep.sum()
    batch_beta = beta * (1 + beta_dpo_a * (batch_mean - gap_mean))
    return F.softplus(-batch_beta.clamp(min=1e-3) * h)


@loss("average", update=update_gap, beta="> 0", gamma="finite", alpha_dpo_alpha=">= 0")
def alpha_dpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    chosen_lengths, rejected_lengths, gap_mean=0.0, gap_std=1.0,
    *, beta=2.5, gamma=1.5, alpha_dpo_alpha=0.2,
):
    """α-DPO: SimPO with a target margin of each pair, larger where h̄ is large already.

    Paper      AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization,
               arXiv:2410.10148v4
    Formula    L = −log σ(β (w̄ − l̄ − m)),        m = γ/β + α (h̄ − μ)/s
               Here μ and s are moving averages of the mean and the standard deviation of h̄.
    Gradient   with u = β (w̄ − l̄ − m): ∂L/∂w = −β σ(−u) / n_w, ∂L/∂l = β σ(−u) / n_l. m has no
               gradient.
    Args       four (B,) log-probs, two (B,) lengths >= 1; gap_mean and gap_std, numbers: μ and s,
               which `update_gap` computes; beta > 0 (authors' recipes 2.5 and 10); gamma finite,
               ABSOLUTE as in `simpo` (authors' recipes γ/β 0.15 to 0.6); alpha_dpo_alpha >= 0
               (authors' recipes 0.05 and 0.2; 0 is SimPO)
    Elsewhere  In the authors' code β multiplies α too, as here. It updates μ and s before they are
               used, from zero, and in evaluation too: a first batch in which policy and reference
               are equal gives NaN. Here μ and s are of the steps before, and start with the first
               step whose h̄ differ by more than rounding; until then m is γ/β.
    """
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    reference_margin = ref_chosen_logps / chosen_lengths - ref_rejected_logps / rejected_lengths
    margin = average_w - average_l
    gap = (margin - reference_margin).detach()  # h̄
    target = gamma / beta + alpha_dpo_alpha * (gap - gap_mean) / gap_std  # m
    return F.softplus(-beta * (margin - target))


@loss("margin", "batch", beta="> 0", dr_beta="> 0")
def dr_dpo(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
    *, beta=0.1, dr_beta=1.0,
):
    """Dr. DPO: a soft minimum over the batch, so that pairs that fit badly count less.

    Paper      Towards Robust Alignment of Language Models: Distributionally Robustifying Direct
               Preference Optimization, arXiv:2407.07880
    Formula    L = −β′ log mean e^(−d/β′),        d = −log σ(βh)
               The mean is over the batch, so L is one number, which every pair gets.
    Gradient   ∂L/∂w_i = −p_i β σ(−βh_i) = −∂L/∂l_i, p = softmax(−d/β′) over the batch. With β′ = 1,
               p_i is proportional to σ(βh_i): a pair that is very wrong, perhaps a flipped label,
               has next to no gradient.
    Args       four (B,) log-probs; beta > 0 (authors' code 0.1); dr_beta > 0, β′ in the formula
               (authors' code 1). L is at most the mean of d, which it becomes for a large β′; for a
               small β′ it becomes the minimum.
    Elsewhere  The authors' code takes exp, mean and log one after another: the loss is inf and the
               gradient NaN in fp32 once every d is above 104 β′. It also reduces each device's
               micro-batch on its own, which is another loss; train.py reduces the pairs of a step.
    """
    a = policy_chosen_logps - ref_chosen_logps
    b = policy_rejected_logps - ref_rejected_logps
    h = a - b
    pair_losses = F.softplus(-beta * h)  # d
    count = torch.tensor(len(h), dtype=h.dtype)
    log_mean = torch.logsumexp(-pair_losses / dr_beta, dim=0) - torch.log(count)
    return (-dr_beta * log_mean).expand_as(h)


# --------------------------------------------------------------------------------------------------
# Reference-free losses: no second model. Nothing but a likelihood term, or the shape and scale of
# the loss, limits how far the policy moves. An averaged likelihood is an average over the tokens of
# the batch, −w/n̄, as in `sft`.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0", cpo_alpha=">= 0", label_smoothing="[0, 0.5)")
def cpo(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, mean_chosen_length=None,
    *, beta=0.1, cpo_alpha=1.0, label_smoothing=0.0,
):
    """CPO: DPO with a uniform reference; the likelihood of the chosen answer prevents drift.

    Paper      Contrastive Preference Optimization, arXiv:2401.08417,
               eq. 5; the preference term alone is eq. 3
    Formula    L = −(1−ε) log σ(β(w − l)) − ε log σ(−β(w − l)) − α w/n̄
    Gradient   ∂L/∂w = −β (σ(−β(w − l)) − ε) − α/n̄, ∂L/∂l = β (σ(−β(w − l)) − ε): only y_w has the
               second, constant term.
    Args       two (B,) log-probs; chosen_lengths (B,) >= 1; mean_chosen_length: see `sft`; beta > 0
               (paper 0.1); cpo_alpha >= 0 (the paper has no such weight: 1); label_smoothing
               in [0, 0.5)
    Elsewhere  The paper sums the likelihood over the answer. TRL and ALMA average it over the
               tokens of the batch, and so do we: α is then a weight per token. TRL's CPO
               with loss_type hinge or ipo is --loss hinge,sft or ipo,sft with --reference_free.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    eps = label_smoothing
    z = beta * (policy_chosen_logps - policy_rejected_logps)
    correct = F.softplus(-z)
    flipped = F.softplus(z)
    likelihood = cpo_alpha * policy_chosen_logps / mean_chosen_length
    return (1 - eps) * correct + eps * flipped - likelihood  # eq. 5


@loss("average", beta="> 0", gamma="finite", cpo_alpha=">= 0", label_smoothing="[0, 0.5)")
def simpo(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
    mean_chosen_length=None, *, beta=2.0, gamma=1.0, cpo_alpha=0.0, label_smoothing=0.0,
):
    """SimPO: the reward is the average log-prob of a token, and must win by a target margin γ.

    The paper's reason: generation approximately maximizes this average.

    Paper      SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734,
               eq. 6 (reward eq. 4)
    Formula    L = −(1−ε) log σ(z) − ε log σ(−z) − α w/n̄,        z = β(w̄ − l̄) − γ
    Gradient   at ε = α = 0: ∂L/∂w = −β σ(−z) / n_w, ∂L/∂l = β σ(−z) / n_l. It pushes until w̄ − l̄
               is well past γ/β, at any length.
    Args       two (B,) log-probs, two (B,) lengths >= 1; mean_chosen_length: see `sft`; beta > 0
               (paper 2 to 2.5, and 10); gamma finite, ABSOLUTE (paper 0.3 to 1.6, and 3);
               cpo_alpha >= 0 (above 0: CPO-SimPO); label_smoothing in [0, 0.5)
    Elsewhere  The authors' code, open-instruct and HALOs take the ratio γ/β; TRL, LLaMA-Factory and
               Liger take γ, as we do. TRL's CPO trainer adds the likelihood by default (α = 1,
               β = 0.1, γ = 0.5), and that is not SimPO.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    eps = label_smoothing
    z = beta * (average_w - average_l) - gamma
    correct = F.softplus(-z)
    flipped = F.softplus(z)
    likelihood = cpo_alpha * policy_chosen_logps / mean_chosen_length
    return (1 - eps) * correct + eps * flipped - likelihood  # eq. 6


@loss("average", beta="> 0", gamma="finite", alphapo_alpha="!= 0")
def alphapo(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
    *, beta=2.5, gamma=0.1, alphapo_alpha=0.25,
):
    """AlphaPO: SimPO with another shape of reward.

    The reward is (1 − p̄^(−α))/α of the average token probability p̄, in place of log p̄.

    Paper      AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884
    Formula    L = −log σ(β(s(w̄) − s(l̄)) − γ),        s(x) = (1 − e^(−αx))/α
    Gradient   with z = β(s(w̄) − s(l̄)) − γ: ∂L/∂w = −β σ(−z) e^(−αw̄) / n_w,
               ∂L/∂l = β σ(−z) e^(−αl̄) / n_l. With α > 0 the gradient is the larger, the less
               probable an answer is; with α < 0 the smaller.
    Args       two (B,) log-probs, two (B,) lengths >= 1; beta > 0 (2.5); gamma finite (0.1);
               alphapo_alpha != 0 and finite (0.25): as α goes to 0 the loss becomes SimPO. TRL's
               documentation quotes the three values from the paper.
    Elsewhere  TRL computes exp(logp)^(−α). Its AlphaPO does this with averages, where it is
               finite; with loss_type sigmoid or hinge its option alpha acts on sums, and the loss
               is NaN in fp32 once both answers are below −104 nats, if not before. Here it is
               one expm1, which `capped_exp` extends linearly beyond the cap.
    """
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    alpha = alphapo_alpha
    score_w = -capped_exp(-alpha * average_w, minus_one=True) / alpha
    score_l = -capped_exp(-alpha * average_l, minus_one=True) / alpha
    return F.softplus(gamma - beta * (score_w - score_l))


@loss("average", repo_gamma=">= 0")
def repo(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
    *, repo_gamma=0.6,
):
    """RePO: SimPO with a hinge, so that a pair is trained until its margin is reached.

    Paper      RePO: ReLU-based Preference Optimization, arXiv:2503.07426v1
    Formula    L = max(0, γ − (w̄ − l̄))
    Gradient   ∂L/∂w = −1/n_w while w̄ − l̄ < γ, exactly 0 beyond; ∂L/∂l = 1/n_l while w̄ − l̄ < γ,
               exactly 0 beyond.
    Args       two (B,) log-probs, two (B,) lengths >= 1; repo_gamma >= 0, a margin of averages, in
               nats per token (authors' recipes 0.6 for Llama 3, 0.4 for Mistral and Gemma 2)
    Elsewhere  γ is SimPO's γ/β, and not its γ. The paper has it as the limit of SimPO for large β:
               SimPO at γ = β · repo_gamma, divided by β. β in the authors' code only scales the
               rewards that it logs.
    """
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    return F.relu(repo_gamma - (average_w - average_l))


@loss("average")
def simper(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths):
    """SimPER: raise the inverse perplexity of y_w, lower that of y_l. No hyper-parameter.

    Paper      SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters,
               arXiv:2502.00883 (ICLR 2025)
    Formula    L = −e^w̄ + e^l̄: an inverse perplexity is the geometric mean of the probabilities of
               the tokens
    Gradient   ∂L/∂w = −e^w̄ / n_w, ∂L/∂l = e^l̄ / n_l: the gradient of each answer depends on its
               own probability alone. An improbable answer gets next to none: y_l falls ever more
               slowly, and a y_w that the policy would hardly write is hardly learned.
    Args       two (B,) log-probs, two (B,) lengths >= 1. The loss lies in (−1, 1).
    Elsewhere  The authors' recipes still name SimPO's β and γ/β, which this loss does not read.
    """
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    return torch.exp(average_l) - torch.exp(average_w)


@loss("average", beta="> 0", nll_weight=">= 0")
def orpo(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
    mean_chosen_length=None, *, beta=0.1, nll_weight=1.0,
):
    """ORPO: supervised fine-tuning with a penalty on the odds of the rejected answer.

    ORPO needs no reference, and no training stage before it.

    Paper      ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691v2,
               eqs. 6 and 7; odds are eq. 4
    Formula    L = −w/n̄ − λ log σ(lo(w̄) − lo(l̄)),
               lo(x) = x − log(1 − eˣ): the log-odds of an average token probability eˣ
    Gradient   with u = lo(w̄) − lo(l̄): ∂L/∂w = −1/n̄ − λ σ(−u) / ((1 − e^w̄) n_w),
               ∂L/∂l = λ σ(−u) / ((1 − e^l̄) n_l). It is strongest on answers that are nearly
               certain.
    Args       two (B,) log-probs < 0, two (B,) lengths >= 1; mean_chosen_length: see `sft`;
               beta > 0, the paper's λ (0.1 for Mistral, 0.2 for Llama 2, 0.25 for Phi-2);
               nll_weight >= 0 (1 in the paper; 0 leaves the odds-ratio term alone)
    Elsewhere  The authors and TRL count the prompt in the likelihood; we score answers only, in
               every loss. log(1 − eˣ) computed as log1p(−exp(x)) is −inf at x ≈ 0 in fp32 (TRL
               0.13, Liger). Here it is expm1, and within one ulp of probability 1 the log-odds are
               extended linearly.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    average_w = policy_chosen_logps / chosen_lengths      # w̄
    average_l = policy_rejected_logps / rejected_lengths  # l̄
    x = torch.stack([average_w, average_l])  # (2, B)
    cap = x.clamp(max=-torch.finfo(x.dtype).eps)
    log_odds = cap - torch.log(-torch.expm1(cap)) - (x - cap) / torch.expm1(cap)  # eq. 4
    log_odds_w, log_odds_l = log_odds
    likelihood = nll_weight * policy_chosen_logps / mean_chosen_length
    return beta * F.softplus(log_odds_l - log_odds_w) - likelihood  # eqs. 6 and 7


@loss(slic_delta=">= 0", slic_lambda=">= 0")
def slic(
    policy_chosen_logps, policy_rejected_logps, policy_target_logps=None,
    *, slic_delta=1.0, slic_lambda=0.1,
):
    """SLiC-HF: a hinge on the log-probs, regularized by the likelihood of a target answer.

    Paper      SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425,
               as RSO (arXiv:2309.06657) quotes it
    Formula    L = max(0, δ − w + l) − λ log π(y_ref|x)
    Gradient   ∂L/∂w = −1 while w − l < δ, 0 beyond; ∂L/∂l = 1 while w − l < δ, 0 beyond; and −λ on
               y_ref, which is added to ∂L/∂w where y_ref is y_w.
    Args       two (B,) log-probs; policy_target_logps (B,), log π(y_ref|x) of the supervised
               target. If it is left out, y_ref is the chosen answer, as with the paper's
               best-ranked candidate. slic_delta >= 0 in nats (1); slic_lambda >= 0
    Elsewhere  SimPO's Table 3 writes y_w for y_ref, and train.py has no other answer to give. HALOs
               broadcasts (B,) against (B, T). turbo-alignment's regularizer is a constant.
    """
    target = policy_chosen_logps if policy_target_logps is None else policy_target_logps
    calibration = F.relu(slic_delta - policy_chosen_logps + policy_rejected_logps)
    return calibration - slic_lambda * target


# --------------------------------------------------------------------------------------------------
# Likelihood: no pair and no reference. `sft` trains the reference policy, and regularizes other
# losses in a sum.
# --------------------------------------------------------------------------------------------------

@loss()
def sft(policy_chosen_logps, chosen_lengths, mean_chosen_length=None):
    """Supervised fine-tuning on the chosen answers: mean negative log-likelihood over the tokens.

    Paper      Maximum likelihood, the stage before DPO: arXiv:2305.18290v3, Sec. 3
    Formula    L_i = −w_i / n̄,        n̄ = mean of n_w over the batch, so that
               mean_i L_i = −Σ w_i / Σ n_w
    Gradient   ∂L_i/∂w_i = −1/n̄: every token of the batch has the same weight, also in long
               answers.
    Args       policy_chosen_logps (B,), chosen_lengths (B,) >= 1; mean_chosen_length: n̄ of the
               whole optimizer step, a number that train.py passes when these B pairs are only a
               part of the step. If it is left out, these pairs are the batch.
    Elsewhere  TRL's "sft" loss averages over the tokens of one device's micro-batch, so
               accumulation changes its gradient. With n̄ passed in, ours is the same for every
               split. Iterative Reasoning PO (arXiv:2404.19733) averages each answer separately.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    return -policy_chosen_logps / mean_chosen_length


# --------------------------------------------------------------------------------------------------
# Unlearning: one answer that should become improbable, and no better one.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0")
def npo(policy_rejected_logps, ref_rejected_logps, *, beta=0.1):
    """NPO: forget an answer. DPO without its chosen half, so a bounded gradient ascent.

    Paper      Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning,
               arXiv:2404.05868
    Formula    L = (2/β) sp(βb), which is (2/β) log(1 + (π/π_ref)^β)
    Gradient   ∂L/∂l = 2 σ(βb): 1 at π = π_ref, as in gradient ascent, and falling to 0 as the
               answer is forgotten. As β goes to 0 it stays 1, which is gradient ascent.
    Args       two (B,) log-probs of the answer to forget, which the data has as `rejected`;
               beta > 0 (authors' code 0.1). At π = π_ref the loss is (2/β) log 2, 13.86 at β = 0.1.
    Elsewhere  The factor 2/β belongs to the loss. --loss npo reads no `chosen`. A retain term is a
               part of a sum: --loss npo,sft keeps `chosen` probable, an answer to the same prompt.
               SimNPO (arXiv:2410.07163) at γ = 0 is this loss on averages with a reference of
               zeros.
    """
    b = policy_rejected_logps - ref_rejected_logps
    return 2 / beta * F.softplus(beta * b)


# --------------------------------------------------------------------------------------------------
# Labels: single answers, each known to be good (desirable) or bad (undesirable). The other answers
# to the same prompt are not needed.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0", desirable_weight=">= 0", undesirable_weight=">= 0")
def kto(
    policy_logps, ref_logps, labels, kl=0.0,
    *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
):
    """KTO: how people value gains and losses, relative to a reference point; good or bad answers.

    Paper      KTO: Model Alignment as Prospect Theoretic Optimization,
               arXiv:2402.01306v4, eq. 8 (eq. 7 in v1)
    Formula    L_D = λ_D (1 − σ(r − βz))        = λ_D σ(βz − r)
               L_U = λ_U (1 − σ(βz − r))        = λ_U σ(r − βz)
               z = max(0, kl)
    Gradient   with u = r − βz: ∂L_D/∂ℓ = −βλ_D σ(u) σ(−u), ∂L_U/∂ℓ = βλ_U σ(u) σ(−u). It is largest
               at the reference point u = 0, and vanishes for answers that are very good or very
               bad: KTO gives up on them. z has no gradient.
    Args       policy_logps, ref_logps, labels (N,); kl, a number: the mean of log π(y′|x) −
               log π_ref(y′|x) over all rows of the optimizer step, each y′ the answer of another
               row. It estimates KL(π ‖ π_ref). beta > 0 (paper 0.1); desirable_weight >= 0 and
               undesirable_weight >= 0: λ_D and λ_U. With n_D good and n_U bad answers, TRL's
               documentation recommends λ_D n_D / (λ_U n_U) from 1 to 4/3.
    Elsewhere  TRL estimates z from one micro-batch, in which it moves each answer to the next
               prompt, so that z depends on the order of the rows and on accumulation. HALOs leaves
               answers whose log-ratio is exactly 0 out of the mean. `kto_pair` is the form for
               pairs.
    """
    r = beta * (policy_logps - ref_logps)  # (N,)
    if torch.is_tensor(kl):  # a number stays one: copying it would make a GPU wait
        z = kl.detach().clamp(min=0)
    else:
        z = max(0.0, kl)
    desirable = desirable_weight * torch.sigmoid(beta * z - r)
    undesirable = undesirable_weight * torch.sigmoid(r - beta * z)
    return torch.where(labels, desirable, undesirable)


@loss(beta="> 0", desirable_weight=">= 0", undesirable_weight=">= 0")
def apo_zero_unpaired(
    policy_logps, ref_logps, labels, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
):
    """APO-zero on single answers: good ones up, bad ones down, each anchored at π_ref.

    Paper      Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266, whose
               loss is of pairs
    Formula    L_D = λ_D σ(−r)
               L_U = λ_U σ(r)
    Gradient   ∂L_D/∂ℓ = −βλ_D σ(r) σ(−r), ∂L_U/∂ℓ = βλ_U σ(r) σ(−r): largest at the anchor r = 0.
    Args       policy_logps, ref_logps, labels (N,); beta > 0; desirable_weight >= 0 and
               undesirable_weight >= 0: λ_D and λ_U
    Elsewhere  A loss type of TRL's KTOTrainer. It is `kto` at kl = 0. The losses of a good and of a
               bad answer add up to `apo_zero`.
    """
    r = beta * (policy_logps - ref_logps)  # (N,)
    desirable = desirable_weight * torch.sigmoid(-r)
    undesirable = undesirable_weight * torch.sigmoid(r)
    return torch.where(labels, desirable, undesirable)


def update_bco_labels(state: dict, means: dict, beta: float) -> dict:
    """The state of `bco` for the next step: δ of BCO's eq. 7, ½ (mean of the rewards of good
    answers + mean of those of bad answers), with a moving average of each mean.

    state   delta, and the two averages, mean_chosen_reward and mean_rejected_reward
    means   over the step: rewards/chosen over its good answers, rewards/rejected over its bad ones.
            A step without answers of a label has no such mean, and that average stays.

    Where every step has both labels, δ is `update_delta`, as in `bco_pair`.
    """
    averages = {}
    for side in ("chosen", "rejected"):
        average = state.get(f"mean_{side}_reward", 0.0)
        reward = means.get(f"rewards/{side}", average)
        averages[f"mean_{side}_reward"] = update_delta(average, reward, reward)
    return {"delta": sum(averages.values()) / 2} | averages


@loss(update=update_bco_labels, beta="> 0")
def bco(policy_logps, ref_logps, labels, delta=0.0, weights=None, *, beta=0.1):
    """BCO: a binary classifier of good and bad answers, whose logit is the implicit reward.

    Paper      Binary Classifier Optimization for Large Language Model Alignment,
               arXiv:2404.04656 (ACL 2025); δ is eq. 7, the pairwise bound eq. 8
    Formula    L_D = −log σ(r − δ)
               L_U = −log σ(δ − r)
    Gradient   ∂L_D/∂ℓ = −β σ(δ − r), ∂L_U/∂ℓ = β σ(r − δ). It never vanishes for an answer that is
               classified wrongly; that of `kto` does. δ gets no gradient.
    Args       policy_logps, ref_logps, labels (N,); delta, a number: half the sum of the running
               mean rewards of good and of bad answers, which `update_bco_labels` computes; weights
               (N,): a factor of each answer's loss (default 1). For prompts of good answers that
               differ from those of bad ones the paper gives each bad answer a density ratio.
               beta > 0 (paper 0.1)
    Elsewhere  TRL's BCOTrainer averages all rewards since the start, so the more frequent label
               decides δ; the paper's δ has half of each label. A good and a bad answer add up to
               `bco_pair`.
    """
    r = beta * (policy_logps - ref_logps)  # (N,)
    if torch.is_tensor(delta):
        delta = delta.detach()
    losses = torch.where(labels, F.softplus(delta - r), F.softplus(r - delta))
    return losses if weights is None else weights * losses


# --------------------------------------------------------------------------------------------------
# Lists: K answers to a prompt, the best one first, or a score of each answer. A constant added to
# all rewards of a list changes none of these losses but `nca`, because Z(x) of eq. 5 cancels.
# --------------------------------------------------------------------------------------------------

@loss(beta="> 0")
def plackett_luce(policy_logps, ref_logps, mask, *, beta=0.1):
    """DPO on rankings: y_1 is chosen among all answers, then y_2 among the rest, and so on.

    Paper      Direct Preference Optimization, arXiv:2305.18290v3, appendix A.3
    Formula    L = Σ_k [log Σ_{j≥k} e^(r_j) − r_k]        = Σ_k log Σ_{j≥k} e^(r_j − r_k)
    Gradient   ∂L/∂ℓ_k is −β (for the last answer too, whose choice is certain) plus β times the
               sum, over the choices i <= k in which y_k still takes part, of its probability
               e^(r_k) / Σ_{j≥i} e^(r_j). The gradients of a list add up to 0.
    Args       policy_logps, ref_logps, mask (B, K): no two answers of one rank; beta > 0 (DPO's)
    Elsewhere  K = 2 is `sigmoid`. It is `softmax_dpo` plus `plackett_luce` of the list without its
               best answer. Learning to rank calls it ListMLE. Copies that add a small number
               inside the logarithm stop learning from answers that are far behind.
    """
    r = beta * (policy_logps - ref_logps)  # (B, K)
    r = r.masked_fill(~mask, 0.0)
    # Choice k is among y_k itself and the answers y_j after it. In a row of padding it is certain.
    both = mask[:, :, None] & mask[:, None, :]  # (B, K, K): y_k and y_j are answers
    itself = torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    takes_part = both.triu() | itself
    candidates = r[:, None, :].masked_fill(~takes_part, -torch.inf)  # (B, K, K)
    log_q = candidates.log_softmax(-1).diagonal(dim1=1, dim2=2)  # (B, K): that y_k is chosen
    return -log_q.sum(-1)


@loss("one_best", beta="> 0")
def softmax_dpo(policy_logps, ref_logps, mask, *, beta=1.0):
    """S-DPO: one chosen answer against several rejected ones, which have no order.

    Paper      On Softmax Direct Preference Optimization for Recommendation, arXiv:2406.09215
    Formula    L = log Σ_k e^(r_k − r_1)        = −log q_1,        q = softmax(r)
    Gradient   ∂L/∂ℓ_1 = −β (1 − q_1), ∂L/∂ℓ_k = β q_k for k > 1: the rejected answer with the
               highest reward is lowered most.
    Args       policy_logps, ref_logps, mask (B, K): y_1 is the chosen answer, and no padding;
               beta > 0 (authors' scripts 1)
    Elsewhere  K = 2 is `sigmoid`. The authors' code takes exp, sum and log one after another: inf
               or NaN in fp32 where y_1 is 95 behind or 110 ahead. Here the name `sdpo` selects
               this function too.
    """
    r = beta * (policy_logps - ref_logps)  # (B, K)
    log_q = r.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return -log_q[:, 0]


LOSSES["sdpo"] = softmax_dpo


@loss(beta="> 0", nca_alpha="> 0")
def infonca(policy_logps, ref_logps, mask, scores, *, beta=0.01, nca_alpha=1.0):
    """InfoNCA: cross-entropy between the softmax of the scores and that of the implicit rewards.

    Paper      Noise Contrastive Alignment of Language Models with Explicit Rewards,
               arXiv:2402.05369v3
    Formula    L = −Σ_k p_k log q_k,        p = softmax(s/α), q = softmax(r)
    Gradient   ∂L/∂ℓ_k = β (q_k − p_k): 0 where the rewards are s/α up to a constant. The
               probability of the best answer may fall, as in DPO.
    Args       policy_logps, ref_logps, mask, scores (B, K), in any order; beta > 0 (authors' recipe
               0.01); nca_alpha > 0, the temperature of the scores (authors' recipe 1e-4 and 1e-3,
               where p is 1 for the best answer and 0 for the others)
    Elsewhere  The authors' code adds 0.01 to the first score, which breaks ties, and takes K = 4.
               At π = π_ref the loss is log K. With p_1 = 1 it is `softmax_dpo`, and with K = 2
               `sigmoid`.
    """
    r = beta * (policy_logps - ref_logps)  # (B, K)
    p = (scores / nca_alpha).masked_fill(~mask, -torch.inf).softmax(-1)
    log_q = r.masked_fill(~mask, -torch.inf).log_softmax(-1)
    log_q = log_q.masked_fill(~mask, 0.0)  # p is 0 there, and 0 times −inf is NaN
    return -(p * log_q).sum(-1)


@loss(beta="> 0", nca_alpha="> 0")
def nca(policy_logps, ref_logps, mask, scores, *, beta=0.01, nca_alpha=1.0):
    """NCA: noise contrastive estimation. Answers are data as their scores say, and noise alike.

    Paper      Noise Contrastive Alignment of Language Models with Explicit Rewards,
               arXiv:2402.05369v3
    Formula    L = −Σ_k p_k log σ(r_k) − 1/K Σ_k log σ(−r_k),        p = softmax(s/α)
    Gradient   ∂L/∂ℓ_k = β [(p_k + 1/K) σ(r_k) − p_k]: that of each answer depends on its own reward
               alone. It is 0 at r_k = log(K p_k), so that an answer of more than the average p
               becomes more probable than under π_ref.
    Args       policy_logps, ref_logps, mask, scores (B, K), in any order; beta > 0 (authors' recipe
               0.01); nca_alpha > 0: see `infonca`. K is the number of answers in the list, without
               padding.
    Elsewhere  With p_1 = 1 and K = 2 it is `nca_pair`. The only loss of lists here that a constant
               per prompt changes.
    """
    r = beta * (policy_logps - ref_logps)  # (B, K)
    r = r.masked_fill(~mask, 0.0)
    p = (scores / nca_alpha).masked_fill(~mask, -torch.inf).softmax(-1)
    noise = mask / mask.sum(-1, keepdim=True).to(r.dtype)  # 1/K, and 0 for padding
    return (p * F.softplus(-r) + noise * F.softplus(r)).sum(-1)


@loss(beta="> 0", exo_beta_r="> 0")
def exo(policy_logps, ref_logps, mask, scores, *, beta=0.5, exo_beta_r=0.5):
    """EXO on lists: the reverse KL, from the softmax of implicit rewards to that of the scores.

    Paper      Towards Efficient Exact Optimization of Language Model Alignment (EXO),
               arXiv:2402.00856
    Formula    L = Σ_k q_k log[q_k/p_k],        p = softmax(s/β_r), q = softmax(r)
    Gradient   ∂L/∂ℓ_k = β q_k (log[q_k/p_k] − L): 0 where the rewards are s/β_r up to a constant.
               An answer of small q gets next to none.
    Args       policy_logps, ref_logps, mask, scores (B, K), in any order; beta > 0, the paper's β_π
               (authors' scripts 0.5, or 0.1 for IMDb); exo_beta_r > 0, β_r in the formula (authors'
               scripts the same)
    Elsewhere  `infonca` is the forward KL between the same two softmaxes, plus the entropy of p.
               With K = 2 it is `exo_pair` with ε = σ(−(s_1 − s_2)/β_r).
    """
    r = beta * (policy_logps - ref_logps)  # (B, K)
    log_p = (scores / exo_beta_r).masked_fill(~mask, -torch.inf).log_softmax(-1)
    log_q = r.masked_fill(~mask, -torch.inf).log_softmax(-1)
    log_ratio = (log_q - log_p).masked_fill(~mask, 0.0)  # −inf − (−inf) is NaN
    return (log_q.exp() * log_ratio).sum(-1)


# --------------------------------------------------------------------------------------------------
# f-DPO: margin losses under an f-divergence other than the reverse KL between π and π_ref.
# --------------------------------------------------------------------------------------------------

def f_divergence_score(
    logratio: torch.Tensor, f_divergence: str = "reverse_kl", alpha: float = 0.5,
) -> torch.Tensor:
    """f-DPO's score s(a) replaces the log-ratio a for f-divergences other than reverse KL.

    Paper      Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
               Divergence Constraints, arXiv:2309.16240
    Formula    s = f′(u) up to a constant, u = eᵃ = π/π_ref.
               reverse_kl  a, which is DPO           js     log(2u/(1+u))
               forward_kl  1 − 1/u: alpha at α = 1   alpha  (1 − u^(−α))/α
    Gradient   s′(a) is 1 for reverse_kl, 1 − σ(a) for js, e^(−αa) for alpha, e^(−a) for forward_kl.
               js pushes answers ever less as they rise; the last two push hardest where the
               probability fell. s(0) = 0 for all, so a loss has its usual value at π = π_ref; s′(0)
               is ½ for js, else 1.
    Args       logratio (B,), w − w° or l − l°; alpha in (0, 1], read by "alpha" alone. Pass the
               scores to a loss as log-probs, with zeros as the reference's. Valid with margin
               losses of sums, because f′ is known up to a constant per prompt.
    Elsewhere  The authors' code wants α in (0, 1), and TRL <= 0.28 had 1 as its default. TRL from
               0.29 on gives the same option the value 1 − α. Its forward_kl is NaN in fp32 once
               both answers fell by 88 nats, and its old cap made the gradient 0. Ours is extended
               linearly beyond the cap.
    """
    if f_divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
        raise ValueError("f_divergence must be reverse_kl, forward_kl, js or alpha, "
                         f"got {f_divergence!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if f_divergence == "reverse_kl":
        return logratio
    if f_divergence == "js":
        log_2 = torch.log(torch.tensor(2.0, dtype=logratio.dtype))
        return F.logsigmoid(logratio) + log_2
    if f_divergence == "forward_kl":
        alpha = 1.0
    return -capped_exp(-alpha * logratio, minus_one=True) / alpha


def capped_exp(x, minus_one=False):
    """eˣ, or eˣ − 1, extended linearly beyond a cap, so that loss and gradient stay finite.

    The cap is half of the largest exponent, 44 in fp32, so that the square of eˣ, which enters the
    norm of the gradient, fits into the dtype too. Beyond the cap the slope is constant and the
    order of two values is kept; a plain clamp would make the gradient 0. With `minus_one`, expm1
    keeps the result exact near 0.
    """
    largest = torch.tensor(torch.finfo(x.dtype).max, dtype=torch.float64)
    cap = x.clamp(max=largest.log().item() / 2)
    if minus_one:
        return torch.expm1(cap) + cap.exp() * (x - cap)
    return cap.exp() * (1 + x - cap)


# --------------------------------------------------------------------------------------------------
# Losses without a function here, and the nearest one. These read the answers of a pair.
#
#   ARPO         arXiv:2410.03115  CPO whose rejected answer counts more, the further apart the two
#                                  averages are: `cpo`
#   ASFT         arXiv:2409.10571  likelihood, and a logistic loss on the log-odds of each answer on
#                                  its own: `orpo`
#   AuxDPO       arXiv:2510.20413  DPO with a trained offset for each answer: `score_margin`
#   BDPO         arXiv:2506.12725  DPO with a mixture of π and π_ref for the rejected answer, by the
#                                  author's web page: `dpo_shift`
#   CPL          arXiv:2310.13639  `dpo_shift` with a reference of zeros
#   γ-PO         arXiv:2506.03690  SimPO or DPO with a target margin of each pair that follows from
#                                  the margins of the batch and of earlier pairs: `alpha_dpo`
#   Mallows-DPO  arXiv:2405.14953  DPO whose margin is scaled by how much preferences about the
#                                  prompt are dispersed: `sigmoid`
#   RPO          arXiv:2405.16436  DPO and a likelihood: --loss sigmoid,sft. The authors' code sums
#                                  the likelihood over the answer, and its weight contains β
#   SimNPO       arXiv:2410.07163  `npo` on averages with a reference of zeros, and a margin γ
#   SquaredPO    arXiv:2602.06788  f-DPO with the score a e^(−a), by a reading note of the paper:
#                                  `f_divergence_score`
#   TPO          arXiv:2405.16681  DPO without a reference, and the likelihood of a third, best
#                                  answer: `slic` with policy_target_logps
#
# These read other data: token log-probs, ranks that depend on the policy.
#
#   TDPO         arXiv:2404.11999  DPO and the KL divergences of the tokens: `sigmoid`
#   SamPO        arXiv:2406.10957  DPO on as many tokens as the shorter answer has, drawn at random:
#                                  `sigmoid` with --ld_alpha
#   LiPO-λ       arXiv:2402.01878  DPO on all pairs of a list, weighted by labels and ranks:
#                                  `plackett_luce`
# --------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    registry.main()
