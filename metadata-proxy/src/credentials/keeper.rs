//! The keeper of one entry: fetches, publishes, waits for the half-life, and starts again for as long as somebody needs it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::entry::{Cached, Entry, Phase};
use super::store::Shared;
use super::turns::{Ending, Need};
use super::{Credentials, Failure, RoleSession};

/// Above every timeout of the AWS client; only so that nothing whatsoever can occupy a turn for ever.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Pauses after failures that may pass: 1 s, 2 s, 4 s, ... 30 s, each shortened by up to a half at random.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After the first `AccessDenied`, doubled for each further one: a role or policy that was just made is not known everywhere
/// for some 12 s (hashicorp/terraform-provider-aws#6566).
const FIRST_DENIAL: Duration = Duration::from_secs(2);
/// With less than this left, botocore asks anew before each of its calls, and waits for it
/// (`RefreshableCredentials._mandatory_refresh_timeout`).
const FEW_LEFT: Duration = Duration::from_secs(10 * 60);
/// How long the count of failures of a key outlives its last asker, if nobody holds it.
const FORGET_AFTER: Duration = Duration::from_secs(60);

pub(super) async fn keep(shared: Arc<Shared>, entry: Arc<Entry>) {
    tokio::select! {
        () = entry.retired.cancelled() => {}
        () = work(&shared, &entry) => {}
    }
    entry.close();
}

/// Ends when the entry has left the store. Everything in here may be dropped at any await.
async fn work(shared: &Arc<Shared>, entry: &Arc<Entry>) {
    let (role, session) = (&entry.key.role_arn, &entry.key.session_name);
    let mut failures = 0;
    let mut again = false;
    loop {
        let need = match entry.serves_until(shared.now()) {
            _ if again => Need::Again,
            Some(expires) => Need::By(expires),
            None => Need::Now,
        };
        let Some(mut turn) = shared.turns.next(role, need).await else {
            return;
        };
        // Whoever wanted it may be gone by now; a queue of such must not become a queue of calls.
        if shared.retire_released(entry) {
            return;
        }
        // Only now: until then askers learn of the last failure at once instead of waiting in a queue.
        entry.set_phase(Phase::Fetching);
        let outcome = fetch(shared, &entry.key).await;
        let ending = Ending::of(&outcome);
        turn.ending = ending;
        drop(turn);
        match outcome {
            Ok(cached) => {
                let expiration = cached.credentials.expiration;
                if failures > 0 || !entry.serves(shared.now()) {
                    tracing::info!(%role, %session, %expiration, "role assumed");
                } else {
                    tracing::debug!(%role, %session, %expiration, "credentials renewed");
                }
                (failures, again) = (0, false);
                let renew = cached.renew;
                entry.publish(cached);
                if shared.retire_released(entry) {
                    return;
                }
                tokio::select! {
                    () = sleep_until(renew) => {
                        if shared.retire_unheld(entry) {
                            return;
                        }
                    }
                    () = entry.woken() => {}
                }
            }
            Err(failure) => {
                failures += 1;
                // Throttling is the account's: it says nothing against this session, whose need is what it was.
                again = ending != Ending::Throttled;
                let left = entry.serves_until(shared.now()).map(|end| end.saturating_duration_since(Instant::now()));
                let pause = pause(&failure, failures, shared.settings.refusal_memory, left);
                tracing::warn!(%role, %session, serving_old = left.is_some(), pause = ?pause, "no new credentials: {failure}");
                let refused = matches!(failure, Failure::Refused { .. });
                let now = shared.now();
                entry.publish_failure(failure, now, now.saturating_add(pause).unwrap_or(now));
                sleep(pause).await;
                // The count of refusals outlasts a container that restarts in a loop.
                if !refused && shared.retire_released(entry) {
                    return;
                }
                // A refusal with nothing to lose waits for somebody to ask: refused containers that never ask cost nothing.
                let retry = shared.held(entry) && (!refused || entry.serves(shared.now()));
                if !retry && !asked_again(shared, entry).await {
                    return;
                }
            }
        }
    }
}

/// Waits idly for the next asker; `false` if the entry was retired because none came.
async fn asked_again(shared: &Arc<Shared>, entry: &Arc<Entry>) -> bool {
    entry.set_phase(Phase::Idle);
    loop {
        tokio::select! {
            () = entry.woken() => return true,
            () = sleep(FORGET_AFTER) => {
                if shared.retire_unheld(entry) {
                    return false;
                }
            }
        }
    }
}

async fn fetch(shared: &Shared, key: &RoleSession) -> Result<Cached, Failure> {
    let sent = Instant::now();
    // A task of its own contains a panic inside the SDK, which would otherwise end the keeper.
    let call = tokio::spawn({
        let (sts, key) = (Arc::clone(&shared.sts), key.clone());
        async move { sts.assume(&key).await }
    });
    let abort = call.abort_handle();
    match timeout(CALL_LIMIT, call).await {
        Ok(Ok(answer)) => accept(answer?, key, sent, shared.now()),
        Ok(Err(error)) => Err(Failure::unavailable(format!("the call of STS for {} broke off: {error}", key.role_arn))),
        Err(_) => {
            abort.abort();
            Err(Failure::unavailable(format!("STS did not answer for {} within {CALL_LIMIT:?}", key.role_arn)))
        }
    }
}

/// Puts dates to new credentials: the end of their life on the monotonic clock, and the time to renew them.
fn accept(credentials: Credentials, key: &RoleSession, sent: Instant, wall: Timestamp) -> Result<Cached, Failure> {
    let now = Instant::now();
    let left = Duration::try_from(credentials.expiration.duration_since(wall)).unwrap_or_default();
    // STS counts the duration from when it answers. If the wall clock shows more than that, it is slow.
    let left = left.min((sent + key.duration).saturating_duration_since(now));
    if left.is_zero() {
        return Err(Failure::unavailable(format!(
            "the credentials that STS issued for {} have already expired by this host's clock ({wall}); set the clock, for example with NTP",
            key.role_arn
        )));
    }
    if left < key.duration / 2 {
        tracing::warn!(role = %key.role_arn, ?left, "credentials live far shorter than asked; check the host's clock");
    }
    let renew_in = renew_in(left);
    Ok(Cached {
        expires: now + left,
        renew: now + renew_in,
        renew_at: wall.saturating_add(renew_in).unwrap_or(credentials.expiration),
        credentials: Arc::new(credentials),
    })
}

/// Before the half-life, so that the second half is left even when a call takes long; spread, so that keys that were
/// fetched together (a daemon's start) are not renewed together. Never at once, whatever STS says.
///
/// Of what is not much longer than `FEW_LEFT`, that is left.
fn renew_in(left: Duration) -> Duration {
    let spread = random();
    let at_half = left.mul_f64(0.40 + 0.08 * spread);
    let at_few = left.saturating_sub(FEW_LEFT).mul_f64(0.80 + 0.16 * spread);
    let renew_in = if left > FEW_LEFT.mul_f64(1.2) { at_half.min(at_few) } else { at_half };
    renew_in.max(Duration::from_secs(1))
}

/// `left` of what is served meanwhile: that is not to run out because of a pause.
fn pause(failure: &Failure, failures: u32, refusal_memory: Duration, left: Option<Duration>) -> Duration {
    let pause = match failure {
        Failure::Refused { code, .. } => match doubled(FIRST_DENIAL, failures) {
            soon if soon < LONGEST_PAUSE && code.starts_with("AccessDenied") => soon.min(refusal_memory),
            _ => refusal_memory,
        },
        Failure::Unavailable { .. } => doubled(FIRST_PAUSE, failures).min(LONGEST_PAUSE).mul_f64(1.0 - 0.5 * random()),
    };
    left.map_or(pause, |left| pause.min(LONGEST_PAUSE).min((left / 4).max(FIRST_PAUSE)))
}

fn doubled(first: Duration, failures: u32) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)))
}

/// In `0.0..1.0`. Good enough to spread load, and no dependency: the standard library seeds each `RandomState` differently.
fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 32;
    f64::from(u32::try_from(bits).unwrap_or_default()) / (f64::from(u32::MAX) + 1.0)
}
