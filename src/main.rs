//! The program: hands its arguments and its environment over to the library.

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    mqtt_publisher_lite::cli::run(env::args_os().skip(1), env::vars_os())
}
