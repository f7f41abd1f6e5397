//! A fault at every command of every operation on tokens. When Redis serves again, no token has two
//! certificates, what was answered with 200 can be redeemed, and no kill that was answered with 200
//! misses.
//!
//! `cargo test --test service faults -- --nocapture` prints what was answered.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use crate::support::command_proxy::{CommandProxy, Fault};
use crate::support::http::Response;
use crate::support::instance::{
    self, Device, onboard, redeem, redeem_patiently, replace, revoke, token,
};
use crate::support::redis::Redis;
use crate::support::service::Service;
use crate::support::{token as jwt, wait};

/// The faults: a name, what happens, and whether it stays until the operation is answered.
const FAULTS: [(&str, Fault, bool); 10] = [
    ("reset-before", Fault::ResetBefore, false),
    ("reset-stays", Fault::ResetBefore, true),
    ("reply-lost", Fault::ReplyLost, false),
    ("replies-lost", Fault::ReplyLost, true),
    ("loading", Fault::Error("LOADING Redis is loading the dataset in memory"), false),
    ("oom", Fault::Error("OOM command not allowed when used memory > 'maxmemory'."), false),
    ("readonly", Fault::Error("READONLY You can't write against a read only replica."), false),
    ("noauth", Fault::Error("NOAUTH Authentication required."), false),
    ("clusterdown", Fault::Error("CLUSTERDOWN The cluster is down"), false),
    ("noperm", Fault::Error("NOPERM this user has no permissions to run this command"), false),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Issue,
    Consume,
    Replace,
    Kill,
}

impl Operation {
    const ALL: [Operation; 4] =
        [Operation::Issue, Operation::Consume, Operation::Replace, Operation::Kill];

    fn ask(self, service: &Service, device: &Device, token: Option<&String>) -> Response {
        match (self, token) {
            (Operation::Consume, Some(token)) => redeem(service, token, device),
            (Operation::Replace, _) => replace(service, device),
            (Operation::Kill, _) => revoke(service, device),
            _ => onboard(service, device),
        }
    }
}

/// An operation that met a fault, or was done before the fault came.
struct Case {
    fault: &'static str,
    /// Which command it was to strike, and that command's name if it did.
    at: usize,
    command: Option<String>,
    device: Device,
    /// The token that there was before.
    old: Option<String>,
    answer: Response,
}

/// Instances on one Redis, of which the first is behind the proxy, and what is asked of it. Each
/// operation has a stage of its own, for at each return an instance enters all that it has used.
struct Stage {
    name: String,
    operation: Operation,
    redis: Redis,
    proxy: CommandProxy,
    services: Vec<Service>,
}

impl Stage {
    fn set(operation: Operation, policy: &str, instances: usize) -> Stage {
        let redis = Redis::start(&[]);
        let proxy = CommandProxy::start(redis.port());
        let env = [("OUTAGE_REDEEM", policy)];
        let mut services = vec![instance::first(&proxy.url(), &env)];
        while services.len() < instances {
            services.push(instance::another(&services[0], &redis.url(), &env));
        }
        Stage { name: format!("{policy}, {instances}"), operation, redis, proxy, services }
    }

    /// The operation with every fault at its first command, its second, and so on until it is done
    /// before the fault comes.
    fn cases(&self) -> Vec<Case> {
        let mut cases = vec![];
        for fault in FAULTS {
            for at in 1.. {
                assert!(at < 50, "{:?} has no end", self.operation);
                cases.push(self.case(fault, at));
                if cases.last().is_some_and(|case| case.command.is_none()) {
                    break;
                }
            }
        }
        cases
    }

    fn case(&self, (fault, how, stays): (&'static str, Fault, bool), at: usize) -> Case {
        let operation = self.operation;
        let device = Device::new(&format!("{fault}-{at}"));
        let issuer = &self.services[(at + 1) % self.services.len()];
        let old = (operation != Operation::Issue).then(|| token(issuer, &device));
        self.proxy.arm(at, how, stays);
        let answer = operation.ask(&self.services[0], &device, old.as_ref());
        if let Some(old) = old.as_ref().filter(|_| operation == Operation::Consume) {
            // What is done after the answer has faults, too.
            wait::for_true("all is done, or struck", || {
                self.proxy.struck().is_some() || answer.status != 200 || !self.counts(old)
            });
        }
        let command = self.proxy.disarm();
        self.services[0].wait_for_storage("redis");
        Case { fault, at, command, device, old, answer }
    }

    fn counts(&self, token: &str) -> bool {
        !self.redis.cli(&["ZSCORE", "mqtt-lite:live", &jwt::live_member(token)]).is_empty()
    }

    /// How many certificates there must be, or what is not as promised.
    fn settle(&self, case: &Case) -> Result<usize, String> {
        let (operation, Case { device, old, .. }) = (self.operation, case);
        let there = &self.services[case.at % self.services.len()];
        let asked_again = || {
            let answer = operation.ask(there, device, old.as_ref());
            (answer.status != 503).then_some(answer)
        };
        let mut answer = case.answer.clone();
        if matches!(answer.status, 503 | 409) {
            answer = wait::until(Duration::from_secs(15), asked_again).ok_or("503 for 15 s")?;
        }
        // A device of which nothing is known: its past is dead all the same.
        let unknown = operation == Operation::Kill && answer.status == 404;
        if answer.status != 200 && !unknown {
            return Err(format!("then {} {}", answer.status, answer.text()));
        }
        self.is_dead(old.as_ref(), device)?;
        let live = match operation {
            Operation::Consume => return Ok(1),
            Operation::Issue | Operation::Replace => answer.field("provisioning_token"),
            Operation::Kill => token(there, device),
        };
        let redeemed = redeem_patiently(there, &live, device);
        if redeemed.status != 200 {
            return Err(format!("cannot be redeemed: {} {}", redeemed.status, redeemed.text()));
        }
        self.is_dead(Some(&live), device).map(|()| 1)
    }

    /// Nobody redeems the token.
    fn is_dead(&self, token: Option<&String>, device: &Device) -> Result<(), String> {
        for (service, token) in self.services.iter().flat_map(|s| token.map(|token| (s, token))) {
            let answer = redeem_patiently(service, token, device);
            if answer.status != 401 {
                return Err(format!("a dead token: {} {}", answer.status, answer.text()));
            }
        }
        Ok(())
    }

    /// How many certificates each device has, whoever has signed them.
    fn certificates(&self) -> BTreeMap<String, usize> {
        let lines = self.services.iter().flat_map(|service| service.index());
        let serials: BTreeMap<String, String> =
            lines.map(|mut line| (line.remove(3), line.pop().unwrap())).collect();
        let mut counts = BTreeMap::new();
        for subject in serials.into_values() {
            *counts.entry(subject.trim_start_matches("/CN=").to_owned()).or_default() += 1;
        }
        counts
    }

    /// Runs and judges all cases.
    fn run(&self) -> (Vec<Case>, Vec<String>) {
        let cases = self.cases();
        let settled: Vec<_> = cases.iter().map(|case| self.settle(case)).collect();
        let certificates = self.certificates();
        let judge = |(case, settled): (&Case, Result<usize, String>)| {
            let signed = certificates.get(&case.device.name).copied().unwrap_or(0);
            let count = |expected| format!("{signed} certificates, not {expected}");
            let wrong = settled.map(|expected| (signed != expected).then(|| count(expected)));
            Some(self.told(case, &wrong.unwrap_or_else(Some)?))
        };
        let violations = cases.iter().zip(settled).filter_map(judge).collect();
        (cases, violations)
    }

    /// What went wrong, and what the logs say of it.
    fn told(&self, case: &Case, what: &str) -> String {
        let Case { fault, at, command, answer, device, .. } = case;
        let (stage, operation) = (&self.name, self.operation);
        let (status, code, name) = (answer.status, answer.code(), &device.name);
        let logs: String = self.services.iter().map(Service::log).collect();
        let story: Vec<&str> =
            logs.lines().filter(|line| line.contains(&format!("{name} "))).collect();
        format!(
            "{stage}: {operation:?}, {fault} at command {at} ({command:?}), answered {status} \
             {code}: {what}\n    {}\n",
            story.join("\n    ")
        )
    }
}

#[test]
fn a_fault_at_every_command() {
    const STAGES: [(&str, usize); 4] = [("own", 1), ("own", 2), ("none", 1), ("none", 2)];
    let run = |operation, (policy, instances)| {
        let stage = Stage::set(operation, policy, instances);
        stage.run()
    };
    let results: Vec<(Operation, Vec<_>)> = thread::scope(|scope| {
        let start = |operation| STAGES.map(|stage| scope.spawn(move || run(operation, stage)));
        let running: Vec<_> = Operation::ALL.map(|operation| (operation, start(operation))).into();
        let ends = running.into_iter().map(|(operation, stages)| {
            (operation, stages.into_iter().map(|stage| stage.join().unwrap()).collect())
        });
        ends.collect()
    });
    println!("| operation | fault | {} |", STAGES.map(|(p, n)| format!("{p}, {n}")).join(" | "));
    println!("|---|---{}|", "|---".repeat(STAGES.len()));
    for (operation, stages) in &results {
        for (fault, ..) in FAULTS {
            let cells: Vec<String> =
                stages.iter().map(|(cases, _)| answers(cases, fault)).collect();
            println!("| {operation:?} | {fault} | {} |", cells.join(" | "));
        }
    }
    let stages = results.iter().flat_map(|(_, stages)| stages);
    let violations: Vec<&str> = stages.flat_map(|(_, wrong)| wrong).map(String::as_str).collect();
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.concat());
}

/// How often what was answered when this fault struck.
fn answers(cases: &[Case], fault: &str) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for Case { answer, .. } in cases.iter().filter(|c| c.fault == fault && c.command.is_some()) {
        *counts.entry(format!("{} {}", answer.status, answer.code())).or_default() += 1;
    }
    let told = counts.iter().map(|(answer, count)| format!("{count} × {}", answer.trim()));
    told.collect::<Vec<_>>().join(", ")
}
