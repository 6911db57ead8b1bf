//! CronJobs: make a Job whenever the schedule says so.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use portolan_client::{EventRecorder, EventType};

use crate::Context;
use crate::job::finished;
use crate::queue::{Key, Next, Queue};
use crate::replicaset::remove;
use crate::util::{
    already_exists, controller_of, controller_reference, is_namespace_terminating, is_not_found, message, reference,
};

const WORKERS: usize = 5;
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// More missed times than this are worth a warning.
const MANY_MISSED: usize = 100;

/// When a CronJob runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// At the minutes that all five fields allow.
    Fields(Box<Fields>),
    /// `@every`: this long after the last time.
    Every(Duration),
}

/// The fields of a schedule as bits: bit N allows the value N.
#[derive(Clone, Debug, PartialEq)]
pub struct Fields {
    minute: u64,
    hour: u64,
    day: u64,
    month: u64,
    weekday: u64,
    /// Whether day or weekday is `*`; otherwise a day matches that one of the two allows (crontab(5)).
    any_day: bool,
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

fn field(text: &str, least: u32, most: u32, names: &[&str]) -> Result<u64, String> {
    let number = |text: &str| -> Result<u32, String> {
        let by_name = names.iter().position(|n| n.eq_ignore_ascii_case(text)).and_then(|at| u32::try_from(at).ok());
        by_name
            .map(|at| at + least)
            .or_else(|| text.parse().ok())
            .ok_or_else(|| format!("failed to parse int from {text}"))
    };
    let mut bits = 0u64;
    for part in text.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(number(step)?)),
            None => (part, None),
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None if range == "*" || range == "?" => (least, most),
            // `N/S` runs from N to the end.
            None => (number(range)?, if step.is_some() { most } else { number(range)? }),
        };
        if first < least {
            return Err(format!("beginning of range ({first}) below minimum ({least}): {part}"));
        }
        if last > most {
            return Err(format!("end of range ({last}) above maximum ({most}): {part}"));
        }
        if first > last {
            return Err(format!("beginning of range ({first}) beyond end of range ({last}): {part}"));
        }
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(format!("step of range should be a positive number: {part}"));
        }
        let mut value = first;
        while value <= last {
            bits |= 1 << value;
            value += step;
        }
    }
    Ok(bits)
}

/// A duration such as `1h30m` in the notation of Go.
fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let seconds = match &tail[..unit] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        rest = &tail[unit..];
    }
    Some(total)
}

impl Schedule {
    /// Reads a schedule: five fields as in crontab(5), or one of `@yearly`, `@annually`, `@monthly`, `@weekly`, `@daily`,
    /// `@midnight`, `@hourly`, `@every DURATION`.
    ///
    /// # Errors
    /// Says which part cannot be read.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let text = text.trim();
        let text = match text {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            other => other,
        };
        if let Some(every) = text.strip_prefix("@every ") {
            let every = duration(every.trim()).ok_or_else(|| format!("failed to parse duration {text}"))?;
            // Whole seconds, at least one.
            return Ok(Schedule::Every(Duration::from_secs(every.as_secs().max(1))));
        }
        if text.starts_with('@') {
            return Err(format!("unrecognized descriptor: {text}"));
        }
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
        };
        let starred = |text: &str| text.split(',').any(|p| p.starts_with('*') || p.starts_with('?'));
        let weekdays = field(weekday, 0, 7, &WEEKDAYS)?;
        Ok(Schedule::Fields(Box::new(Fields {
            minute: field(minute, 0, 59, &[])?,
            hour: field(hour, 0, 23, &[])?,
            day: field(day, 1, 31, &[])?,
            month: field(month, 1, 12, &MONTHS)?,
            // Both 0 and 7 are Sunday.
            weekday: weekdays | weekdays >> 7,
            any_day: starred(day) || starred(weekday),
        })))
    }

    /// The first time after `from`. `None` if there is none within five years. A time that the zone skips does not occur, one that
    /// it repeats occurs once.
    pub fn next(&self, from: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let fields = match self {
            Schedule::Every(pause) => {
                let from = Timestamp::from_second(from.as_second()).ok()?;
                return from.checked_add(*pause).ok();
            }
            Schedule::Fields(fields) => fields,
        };
        let here = zone.to_datetime(from);
        let mut at = here.with().second(0).subsec_nanosecond(0).build().ok()?.checked_add(1.minute()).ok()?;
        let end = here.checked_add(5.years()).ok()?;
        while at < end {
            at = match fields.skip(at) {
                Some(later) => later,
                None => {
                    let time = zone.to_ambiguous_timestamp(at);
                    if !time.offset().is_ambiguous_gap() {
                        let time = time.earlier().ok()?;
                        if time > from {
                            return Some(time);
                        }
                    }
                    at.checked_add(1.minute()).ok()?
                }
            };
        }
        None
    }
}

trait Gap {
    fn is_ambiguous_gap(&self) -> bool;
}

impl Gap for jiff::tz::AmbiguousOffset {
    fn is_ambiguous_gap(&self) -> bool {
        matches!(self, jiff::tz::AmbiguousOffset::Gap { .. })
    }
}

impl Fields {
    /// `None` when the minute is allowed, otherwise a later one to try.
    fn skip(&self, at: DateTime) -> Option<DateTime> {
        let allows = |bits: u64, value: i8| bits >> value & 1 == 1;
        let next_day = || at.date().tomorrow().ok().map(|d| d.at(0, 0, 0, 0));
        let far = || Some(DateTime::MAX);
        if !allows(self.month, at.month()) {
            let first = at.date().first_of_month().checked_add(1.month()).ok().map(|d| d.at(0, 0, 0, 0));
            return first.or_else(far);
        }
        let (day, weekday) =
            (allows(self.day, at.day()), allows(self.weekday, at.date().weekday().to_sunday_zero_offset()));
        let today = if self.any_day { day && weekday } else { day || weekday };
        if !today {
            return next_day().or_else(far);
        }
        if !allows(self.hour, at.hour()) {
            let hour = at.with().minute(0).build().ok().and_then(|d| d.checked_add(1.hour()).ok());
            return hour.or_else(far);
        }
        if !allows(self.minute, at.minute()) {
            return at.checked_add(1.minute()).ok().or_else(far);
        }
        None
    }
}

/// The last time that is due and how many there were since `earliest`, counted up to a hundred and one more.
pub fn due(schedule: &Schedule, zone: &TimeZone, earliest: Timestamp, now: Timestamp) -> Option<(Timestamp, usize)> {
    let mut last = schedule.next(earliest, zone).filter(|t| *t <= now)?;
    let mut count = 1;
    while let Some(next) = schedule.next(last, zone).filter(|t| *t <= now) {
        last = next;
        count += 1;
        if count > MANY_MISSED {
            break;
        }
    }
    if count > MANY_MISSED {
        // Found from near the end, in windows that grow.
        let mut window = Duration::from_secs(120);
        loop {
            let from = now.checked_sub(window).unwrap_or(Timestamp::MIN).max(last);
            let mut found = None;
            let mut at = from;
            while let Some(next) = schedule.next(at, zone).filter(|t| *t <= now) {
                found = Some(next);
                at = next;
            }
            match found {
                Some(found) => return Some((found, count)),
                None if from == last => break,
                None => window = window.saturating_mul(8),
            }
        }
    }
    Some((last, count))
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("cronjob");
    let add = queue.clone();
    context.caches.cron_jobs.on_change(move |old, new| {
        if let Some(cron) = new.or(old) {
            add.add(Key::of(&**cron));
        }
    });
    let add = queue.clone();
    context.caches.jobs.on_change(move |old, new| {
        for job in [old, new].into_iter().flatten() {
            if let Some(owner) = controller_of(&**job).filter(|o| o.kind == "CronJob") {
                add.add(Key::new(job.metadata.namespace.clone().unwrap_or_default(), &owner.name));
            }
        }
    });
    async move {
        let events = context.recorder("cronjob-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

/// A Job for one time of the schedule. Its name holds the minute, so that a time is never served twice.
pub fn make_job(cron: &CronJob, at: Timestamp, zone: &TimeZone) -> Job {
    let template = cron.spec.job_template.clone();
    let meta = template.metadata.unwrap_or_default();
    let mut annotations = meta.annotations.unwrap_or_default();
    let local = at.to_zoned(zone.clone());
    annotations.insert(SCHEDULED_AT.into(), local.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string().replace("+00:00", "Z"));
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", cron.metadata.name.as_deref().unwrap_or_default(), at.as_second() / 60)),
            namespace: cron.metadata.namespace.clone(),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(cron)]),
            ..Default::default()
        },
        spec: template.spec,
        status: None,
    }
}

async fn remove_job(context: &Context, events: &EventRecorder, cron: &CronJob, job: &Job) -> anyhow::Result<()> {
    let namespace = job.metadata.namespace.as_deref().unwrap_or_default();
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let api: Api<Job> = Api::namespaced(context.client.clone(), namespace);
    match remove(&api, &context.caches.jobs, job, &DeleteParams::background()).await {
        Ok(()) => {
            events.event(&reference(cron), EventType::Normal, "SuccessfulDelete", format!("Deleted job {name}"));
            Ok(())
        }
        Err(error) => {
            let text = format!("Deleted job: {}", message(&error));
            events.event(&reference(cron), EventType::Warning, "FailedDelete", text);
            Err(error).context("cannot delete a job")
        }
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(cron) = caches.cron_jobs.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    if cron.metadata.deletion_timestamp.is_some() {
        return Ok(Next::Wait);
    }
    let about = reference(&*cron);
    let spec = cron.spec.clone();
    let before = cron.status.clone().unwrap_or_default();
    let mut status = before.clone();
    let jobs = cron.metadata.uid.as_deref().map(|uid| caches.jobs.controlled_by(uid)).unwrap_or_default();

    // Follow what the Jobs have come to.
    let mut ended: Vec<(&Arc<Job>, bool)> = Vec::new();
    for job in &jobs {
        let Some(outcome) = job.status.as_ref().and_then(finished) else { continue };
        let complete = outcome.0.type_ == "Complete";
        ended.push((job, complete));
        let active = status.active.get_or_insert_default();
        if let Some(at) = active.iter().position(|a| a.uid == job.metadata.uid) {
            active.remove(at);
            let name = job.metadata.name.as_deref().unwrap_or_default();
            let text = format!("Saw completed job: {name}, condition: {}", outcome.0.type_);
            events.event(&about, EventType::Normal, "SawCompletedJob", text);
        }
        let completed = job.status.as_ref().and_then(|s| s.completion_time.clone());
        if complete && completed.as_ref().map(|t| t.0) > status.last_successful_time.as_ref().map(|t| t.0) {
            status.last_successful_time = completed;
        }
    }
    if let Some(active) = &mut status.active {
        // A Job that has been deleted is not active.
        active.retain(|a| jobs.iter().any(|j| j.metadata.uid == a.uid));
    }
    let limits =
        [(true, spec.successful_jobs_history_limit.unwrap_or(3)), (false, spec.failed_jobs_history_limit.unwrap_or(1))];
    for (complete, limit) in limits {
        // What is being deleted and waits for a finalizer does not count.
        let stays = |job: &Job| job.metadata.deletion_timestamp.is_none();
        let mut kind: Vec<&Arc<Job>> =
            ended.iter().filter(|(job, c)| *c == complete && stays(job)).map(|(job, _)| *job).collect();
        kind.sort_by_key(|j| {
            (j.status.as_ref().and_then(|s| s.start_time.clone()).map(|t| t.0), j.metadata.name.clone())
        });
        let excess = kind.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        for job in kind.into_iter().take(excess) {
            remove_job(&context, &events, &cron, job).await?;
        }
    }
    let next = start_due(&context, &events, &cron, &mut status).await;
    status.active = status.active.filter(|a| !a.is_empty());
    if status != before {
        write(&context, &cron, status).await?;
    }
    next
}

/// Starts the Job whose time has come, if there is one, and says when to look again.
async fn start_due(
    context: &Context,
    events: &EventRecorder,
    cron: &CronJob,
    status: &mut CronJobStatus,
) -> anyhow::Result<Next> {
    let about = reference(cron);
    let spec = cron.spec.clone();
    let namespace = cron.metadata.namespace.as_deref().unwrap_or_default();
    if spec.suspend == Some(true) {
        return Ok(Next::Wait);
    }
    let zone = match spec.time_zone.as_deref() {
        None => TimeZone::UTC,
        Some(name) => match TimeZone::get(name) {
            Ok(zone) => zone,
            Err(error) => {
                let text = format!("invalid timeZone: {name:?}: {error}");
                events.event(&about, EventType::Warning, "UnknownTimeZone", text);
                return Ok(Next::Wait);
            }
        },
    };
    let schedule = match Schedule::parse(&spec.schedule) {
        Ok(schedule) => schedule,
        Err(error) => {
            let text = format!("unparseable schedule: {:?} : {error}", spec.schedule);
            events.event(&about, EventType::Warning, "UnparseableSchedule", text);
            return Ok(Next::Wait);
        }
    };
    let now = context.clock.now();
    let wait = |from: Timestamp| match schedule.next(from, &zone) {
        // A little later, so that the time has come by all clocks.
        Some(at) => {
            Next::After(Duration::try_from(at.duration_since(now)).unwrap_or_default() + Duration::from_millis(100))
        }
        None => Next::Wait,
    };
    let created = cron.metadata.creation_timestamp.as_ref().map_or(now, |t| t.0);
    let mut earliest = status.last_schedule_time.as_ref().map_or(created, |t| t.0);
    let deadline = spec.starting_deadline_seconds.map(|s| Duration::from_secs(u64::try_from(s).unwrap_or(0)));
    if let Some(oldest) = deadline.and_then(|d| now.checked_sub(d).ok()) {
        earliest = earliest.max(oldest);
    }
    let Some((at, missed)) = due(&schedule, &zone, earliest, now) else { return Ok(wait(now)) };
    if missed > MANY_MISSED {
        let text = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
        events.event(&about, EventType::Warning, "TooManyMissedTimes", text);
    }
    let late = Duration::try_from(now.duration_since(at)).unwrap_or_default();
    if deadline.is_some_and(|allowed| late > allowed) {
        let text = format!("Missed scheduled time to start a job: {at}");
        events.event(&about, EventType::Warning, "MissSchedule", text);
        return Ok(wait(now));
    }
    let job = make_job(cron, at, &zone);
    let name = job.metadata.name.clone().unwrap_or_default();
    let active = status.active.get_or_insert_default();
    if active.iter().any(|a| a.name.as_ref() == Some(&name)) {
        return Ok(wait(now));
    }
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !active.is_empty() => {
            let text = "Not starting job because prior execution is running and concurrency policy is Forbid";
            events.event(&about, EventType::Normal, "JobAlreadyActive", text);
            return Ok(wait(now));
        }
        Some("Replace") => {
            for old in std::mem::take(active) {
                let known = context.caches.jobs.get(namespace, old.name.as_deref().unwrap_or_default());
                // What is not known is gone.
                if let Some(job) = known.filter(|job| job.metadata.uid == old.uid) {
                    remove_job(context, events, cron, &job).await?;
                }
            }
        }
        _ => {}
    }
    let api: Api<Job> = Api::namespaced(context.client.clone(), namespace);
    let made = match api.create(&PostParams::default(), &job).await {
        Ok(made) => {
            events.event(&about, EventType::Normal, "SuccessfulCreate", format!("Created job {name}"));
            context.caches.jobs.wrote(made.clone());
            made
        }
        Err(error) if is_namespace_terminating(&error) => return Ok(Next::Wait),
        // Made in an earlier attempt whose status was not written.
        Err(error) if already_exists(&error) => {
            let known = api.get(&name).await.context("cannot read the job")?;
            if controller_of(&known).map(|o| Some(&o.uid)) != Some(cron.metadata.uid.as_ref()) {
                return Err(error).context("another job has the name");
            }
            known
        }
        Err(error) => {
            let text = format!("Error creating job: {}", message(&error));
            events.event(&about, EventType::Warning, "FailedCreate", text);
            return Err(error).context("cannot create the job");
        }
    };
    if made.status.as_ref().and_then(finished).is_none() {
        status.active.get_or_insert_default().push(ObjectReference { field_path: None, ..reference(&made) });
    }
    status.last_schedule_time = Some(Time(at));
    Ok(wait(now))
}

async fn write(context: &Context, cron: &CronJob, status: CronJobStatus) -> anyhow::Result<()> {
    let namespace = cron.metadata.namespace.as_deref().unwrap_or_default();
    let api: Api<CronJob> = Api::namespaced(context.client.clone(), namespace);
    let mut updated = cron.clone();
    updated.status = Some(status);
    match api.replace_status(cron.metadata.name.as_deref().unwrap_or_default(), &PostParams::default(), &updated).await
    {
        Ok(written) => context.caches.cron_jobs.wrote(written),
        Err(error) if is_not_found(&error) => {}
        Err(error) => return Err(error).context("cannot update the status"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, from: &str, zone: &str) -> String {
        let zone = TimeZone::get(zone).unwrap();
        let next = Schedule::parse(schedule).unwrap().next(from.parse().unwrap(), &zone);
        next.map_or_else(|| "never".to_string(), |t| t.to_string())
    }

    #[test]
    fn schedules_as_in_crontab() {
        for (schedule, from, zone, expected) in [
            ("* * * * *", "2026-01-01T00:00:30Z", "UTC", "2026-01-01T00:01:00Z"),
            ("*/15 * * * *", "2026-01-01T00:15:00Z", "UTC", "2026-01-01T00:30:00Z"),
            ("5-10/2 3 * * *", "2026-01-01T03:07:00Z", "UTC", "2026-01-01T03:09:00Z"),
            ("0 9 * * mon-FRI", "2026-01-02T10:00:00Z", "UTC", "2026-01-05T09:00:00Z"),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "UTC", "2026-01-04T00:00:00Z"),
            ("0 0 13 * 5", "2026-01-01T00:00:00Z", "UTC", "2026-01-02T00:00:00Z"),
            ("0 0 29 feb *", "2026-01-01T00:00:00Z", "UTC", "2028-02-29T00:00:00Z"),
            ("0 0 31 2 *", "2026-01-01T00:00:00Z", "UTC", "never"),
            ("@hourly", "2026-01-01T00:00:00Z", "UTC", "2026-01-01T01:00:00Z"),
            ("@every 90m", "2026-01-01T00:00:00Z", "UTC", "2026-01-01T01:30:00Z"),
            ("0 12 * * *", "2026-07-01T00:00:00Z", "Europe/Berlin", "2026-07-01T10:00:00Z"),
            // 02:30 does not exist on 29 March in Berlin, and exists twice on 25 October.
            ("30 2 * * *", "2026-03-28T12:00:00Z", "Europe/Berlin", "2026-03-30T00:30:00Z"),
            ("30 2 * * *", "2026-10-24T12:00:00Z", "Europe/Berlin", "2026-10-25T00:30:00Z"),
            ("30 2 * * *", "2026-10-25T00:30:00Z", "Europe/Berlin", "2026-10-26T01:30:00Z"),
        ] {
            assert_eq!(next(schedule, from, zone), expected, "{schedule} after {from} in {zone}");
        }
    }

    #[test]
    fn what_is_no_schedule() {
        for text in
            ["", "* * * *", "60 * * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "x * * * *", "@never", "@every x"]
        {
            assert!(Schedule::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_last_missed_time_counts() {
        let minutely = Schedule::parse("* * * * *").unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let due = |earliest: &str, now: &str| due(&minutely, &TimeZone::UTC, at(earliest), at(now));
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:00:30Z"), None);
        assert_eq!(due("2026-01-01T00:00:00Z", "2026-01-01T00:03:30Z"), Some((at("2026-01-01T00:03:00Z"), 3)));
        assert_eq!(due("2025-01-01T00:00:00Z", "2026-01-01T00:03:30Z"), Some((at("2026-01-01T00:03:00Z"), 101)));
    }

    #[test]
    fn a_job_is_named_after_its_minute() {
        let cron: CronJob = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "c", "namespace": "ns", "uid": "c"},
            "spec": {"schedule": "* * * * *", "jobTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {"template": {}}}}
        }))
        .unwrap();
        let job = make_job(&cron, "2026-01-01T00:01:00Z".parse().unwrap(), &TimeZone::get("Europe/Berlin").unwrap());
        assert_eq!(job.metadata.name.as_deref(), Some("c-29453761"));
        assert_eq!(job.metadata.annotations.unwrap()[SCHEDULED_AT], "2026-01-01T01:01:00+01:00");
        assert_eq!(job.metadata.labels.unwrap()["a"], "b");
    }
}
