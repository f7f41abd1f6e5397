//! Several instances on one Redis, and several processes on one folder.

use std::sync::Barrier;
use std::thread;

use crate::support::csr::Csr;
use crate::support::engine::Engine;
use crate::support::http::Response;
use crate::support::instance::certificates;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, load, token, wait};

#[test]
fn a_token_outlives_a_restart_of_the_service() {
    let redis = Redis::start(&[]);
    let mut service = with(&redis, Setup::new());
    let compact = service.token("d");
    assert_eq!(service.terminate().code, Some(0));
    service.restart();
    service.wait_for_storage("redis");
    check_error(&service.onboard("d"), 409, "TOKEN_ALREADY_ACTIVE", "after the restart");
    let answer = service.sign(&compact, &Csr::new("d").make());
    assert_eq!(answer.status, 200, "{}", answer.text());
    wait::for_true("both keys are gone after use", || {
        !redis.exists(&format!("mqtt-lite:token:{compact}")) && !redis.exists("mqtt-lite:device:d")
    });
}

#[test]
fn a_second_instance_redeems_what_the_first_issued() {
    let redis = Redis::start(&[]);
    let (one, two) = pair(&redis);
    let compact = one.token("d");
    check_error(&two.onboard("d"), 409, "TOKEN_ALREADY_ACTIVE", "onboarding at the second");
    let csr = Csr::new("d").make();
    let answer = two.sign(&compact, &csr);
    assert_eq!(answer.status, 200, "{}", answer.text());
    check_error(&one.sign(&compact, &csr), 401, "TOKEN_ALREADY_USED", "redeeming at the first");
    check_error(&two.sign(&compact, &csr), 401, "TOKEN_ALREADY_USED", "redeeming at the second");
    assert_eq!((one.index().len(), two.index().len()), (0, 1));
    assert_ne!(one.read("instance-id"), two.read("instance-id"));
}

#[test]
fn a_second_process_on_the_same_folder_ends() {
    let first = Service::start(&[]);
    let folder = first.data("").display().to_string();
    let exit = Setup::new().env("DATA_DIR", &folder).run();
    assert_eq!(exit.code, Some(1), "{}", exit.log);
    assert!(exit.log.contains(folder.trim_end_matches('/')), "names the folder: {}", exit.log);
    let ca = first.data("ca").display().to_string();
    let exit = Setup::new().env("CA_STORAGE_PATH", &ca).run();
    assert_eq!(exit.code, Some(1), "a data folder of its own, but the CA of another: {}", exit.log);
    assert!(exit.log.contains(&ca), "names the folder: {}", exit.log);
    assert_eq!(first.onboard("d").status, 200, "the first goes on");
}

#[test]
fn a_folder_is_free_again_after_a_crash() {
    let mut service = Setup::new().start();
    service.kill9();
    service.restart();
    assert_eq!(service.onboard("d").status, 200);
}

#[test]
fn an_instance_with_another_ca_is_reported() {
    let redis = Redis::start(&[]);
    let one = with(&redis, Setup::new());
    assert_eq!(one.http.get("/ready").status, 200);
    let other = with(&redis, Setup::new());
    wait::for_true("/ready tells of it", || other.http.get("/ready").status == 503);
    let ready = other.http.get("/ready");
    let reasons = ready.json()["reasons"].to_string();
    assert!(reasons.contains("CA") || reasons.contains("ca"), "{reasons}");
    let log = other.log();
    let fingerprint = redis.cli(&["GET", "mqtt-lite:ca"]);
    assert!(log.contains("ERROR") && log.contains(&fingerprint[..8]), "{log}");
    assert_eq!(other.onboard("d").status, 200, "it goes on serving");
    redis.cli(&["DEL", "mqtt-lite:ca"]);
}

#[test]
fn without_a_shared_secret_there_is_a_warning() {
    let redis = Redis::start(&[]);
    let service = Setup::new().env("REDIS_URL", &redis.url()).start();
    let log = service.log();
    assert!(log.lines().any(|l| l.contains("WARN") && l.contains("JWT_SECRET")), "{log}");
}

#[test]
fn one_token_fifty_requests_two_instances_one_certificate() {
    for engine in Engine::ALL {
        race_for_one_token(&engine.start().env());
    }
}

fn race_for_one_token(redis: &[(&str, String)]) {
    let one = &with_env(redis, Setup::new());
    let two = &with_env(redis, Setup::new().share_ca(one));
    let (compact, csr) = (one.token("d"), Csr::new("d").make());
    let barrier = Barrier::new(50);
    let answers: Vec<Response> = thread::scope(|scope| {
        let all: Vec<_> = (0..50)
            .map(|n| {
                let service = if n % 2 == 0 { one } else { two };
                let (barrier, compact, csr) = (&barrier, &compact, &csr);
                scope.spawn(move || {
                    barrier.wait();
                    service.sign(compact, csr)
                })
            })
            .collect();
        all.into_iter().map(|a| a.join().unwrap()).collect()
    });
    let won = answers.iter().filter(|a| a.status == 200).count();
    for lost in answers.iter().filter(|a| a.status != 200) {
        check_error(lost, 401, "TOKEN_ALREADY_USED|TOKEN_NOT_FOUND", "a loser");
    }
    assert_eq!(won, 1);
    assert_eq!(certificates(&[one, two]), 1, "one record over both");
}

#[test]
fn two_onboardings_of_one_device_a_thousand_times() {
    const ROUNDS: usize = 1000;
    let redis = Redis::start(&[]);
    let (one, two) = pair(&redis);
    // Every other round both go to the same instance.
    let server = |round: usize, side: usize| {
        if side == 1 && round.is_multiple_of(2) { two.http } else { one.http }
    };
    let barrier = Barrier::new(2);
    let side = |side: usize| -> Vec<(u16, String)> {
        (0..ROUNDS)
            .map(|round| {
                barrier.wait();
                let answer = load::onboard(&server(round, side), &format!("twin-{round}")).unwrap();
                (answer.status, answer.code())
            })
            .collect()
    };
    let (a, b) = thread::scope(|scope| {
        let (a, b) = (scope.spawn(|| side(0)), scope.spawn(|| side(1)));
        (a.join().unwrap(), b.join().unwrap())
    });
    let (win, lose) = ((200, String::new()), (409, "TOKEN_ALREADY_ACTIVE".to_owned()));
    for (round, pair) in a.into_iter().zip(b).enumerate() {
        let fits = pair == (win.clone(), lose.clone()) || pair == (lose.clone(), win.clone());
        assert!(fits, "round {round}: {pair:?}");
    }
    assert_eq!(redis.keys().iter().filter(|k| k.contains(":device:")).count(), ROUNDS);
    wait::for_true("no token of a loser is left", || {
        redis.keys().iter().filter(|k| k.contains(":token:")).count() == ROUNDS
    });
    wait::for_true("all are counted", || one.token_count() == ROUNDS as u64);
}

fn with(redis: &Redis, setup: Setup) -> Service {
    with_env(&redis.env(), setup)
}

fn with_env(redis: &[(&str, String)], setup: Setup) -> Service {
    let service = setup.env_of(redis).env("JWT_SECRET", token::SECRET).start();
    service.wait_for_storage("redis");
    service
}

/// Two instances with folders of their own, one CA, one secret and one Redis.
fn pair(redis: &Redis) -> (Service, Service) {
    let one = with(redis, Setup::new());
    let two = with(redis, Setup::new().share_ca(&one));
    (one, two)
}
