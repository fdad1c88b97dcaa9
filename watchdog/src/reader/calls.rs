//! From a client's message to a call that the daemon knows, and from a result to a reply. Pure.

use std::os::fd::RawFd;

use hostler_protocol::message::{Call, Reply};
use hostler_protocol::methods::{
    Adopt, CallError, ClaimDirectory, CloseLease, Method, OpenLease, Plan, Reclaim, RegisterLoop,
    ReportBuild, Status, Why,
};
use hostler_protocol::{INTERFACE, INTERFACE_DESCRIPTION};
use serde_json::{Map, Value, json};

use super::message::Asked;

/// Varlink's own interface, which every service has.
const SERVICE: &str = "org.varlink.service";

/// What a message leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    /// The daemon has to be asked.
    Ask(Box<Asked>),
    /// This is the answer.
    Say(Reply),
}

/// Reads a call. `passed` are the numbers of the descriptors that came beside it.
#[must_use]
pub fn read(call: Call, passed: &[RawFd]) -> Read {
    match understand(call, passed) {
        Ok(read) => read,
        Err(reply) => Read::Say(*reply),
    }
}

fn understand(call: Call, passed: &[RawFd]) -> Result<Read, Box<Reply>> {
    let parameters = call.parameters.unwrap_or_default();
    let Some((interface, method)) = call.method.rsplit_once('.') else {
        return Err(service_error("MethodNotFound", json!({ "method": call.method })));
    };
    match interface {
        INTERFACE => ours(method, parameters, passed).map(|asked| Read::Ask(Box::new(asked))),
        SERVICE => service(method, &parameters).map(Read::Say),
        _ => Err(service_error("InterfaceNotFound", json!({ "interface": interface }))),
    }
}

fn ours(method: &str, parameters: Map<String, Value>, passed: &[RawFd]) -> Result<Asked, Box<Reply>> {
    // A descriptor's index among those passed becomes its number in this process.
    let place = |index: &mut u32| {
        let number = passed.get(*index as usize).and_then(|number| u32::try_from(*number).ok());
        let none = || CallError::Refused { reason: format!("no descriptor with index {index} was passed") };
        *index = number.ok_or_else(|| Box::new(error_reply(&none())))?;
        Ok::<(), Box<Reply>>(())
    };
    Ok(match method {
        OpenLease::NAME => {
            let mut call: OpenLease = arguments(parameters)?;
            call.owner.as_mut().map(place).transpose()?;
            Asked::OpenLease(call)
        }
        Adopt::NAME => {
            let mut call: Adopt = arguments(parameters)?;
            place(&mut call.process)?;
            Asked::Adopt(call)
        }
        ClaimDirectory::NAME => {
            let mut call: ClaimDirectory = arguments(parameters)?;
            place(&mut call.directory)?;
            Asked::ClaimDirectory(call)
        }
        RegisterLoop::NAME => {
            let mut call: RegisterLoop = arguments(parameters)?;
            place(&mut call.device)?;
            Asked::RegisterLoop(call)
        }
        ReportBuild::NAME => Asked::ReportBuild(arguments(parameters)?),
        CloseLease::NAME => Asked::CloseLease(arguments(parameters)?),
        Status::NAME => Asked::Status(arguments(parameters)?),
        Why::NAME => Asked::Why(arguments(parameters)?),
        Plan::NAME => Asked::Plan(arguments(parameters)?),
        Reclaim::NAME => Asked::Reclaim(arguments(parameters)?),
        _ => {
            let method = format!("{INTERFACE}.{method}");
            return Err(service_error("MethodNotFound", json!({ "method": method })));
        }
    })
}

fn service(method: &str, parameters: &Map<String, Value>) -> Result<Reply, Box<Reply>> {
    let results = match method {
        "GetInfo" => json!({
            "vendor": "Hostler",
            "product": "hostlerd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": [SERVICE, INTERFACE],
        }),
        "GetInterfaceDescription" => match parameters.get("interface").and_then(Value::as_str) {
            Some(INTERFACE) => json!({ "description": INTERFACE_DESCRIPTION }),
            Some(SERVICE) => json!({ "description": SERVICE_DESCRIPTION }),
            Some(other) => return Err(service_error("InterfaceNotFound", json!({ "interface": other }))),
            None => return Err(service_error("InvalidParameter", json!({ "parameter": "interface" }))),
        },
        _ => {
            let method = format!("{SERVICE}.{method}");
            return Err(service_error("MethodNotFound", json!({ "method": method })));
        }
    };
    Ok(Reply { parameters: object(results), ..Reply::default() })
}

/// Varlink's own interface, in its own words where they are names.
const SERVICE_DESCRIPTION: &str = "\
# What every Varlink service answers.
interface org.varlink.service

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
";

fn arguments<M: Method>(parameters: Map<String, Value>) -> Result<M, Box<Reply>> {
    serde_json::from_value(Value::Object(parameters)).map_err(|error| {
        // Varlink has room for the parameter's name only; the sentence says it, and what was
        // expected.
        service_error("InvalidParameter", json!({ "parameter": error.to_string() }))
    })
}

fn object(value: Value) -> Option<Map<String, Value>> {
    match value {
        Value::Object(object) => Some(object),
        _ => None,
    }
}

fn service_error(name: &str, details: Value) -> Box<Reply> {
    Box::new(Reply {
        parameters: object(details),
        error: Some(format!("{SERVICE}.{name}")),
        ..Reply::default()
    })
}

/// One of our own errors as Varlink sends it.
#[must_use]
pub fn error_reply(error: &CallError) -> Reply {
    let (name, details) = error.on_the_wire();
    Reply { parameters: object(details), error: Some(format!("{INTERFACE}.{name}")), ..Reply::default() }
}

#[cfg(test)]
mod tests {
    use hostler_protocol::methods::NAMES;

    use super::*;

    fn call(method: &str, parameters: &Value) -> Call {
        let text = json!({ "method": method, "parameters": parameters });
        serde_json::from_value(text).expect("a call")
    }

    #[test]
    fn an_index_becomes_the_number_of_a_passed_descriptor_and_never_of_another() {
        let adopt = |process: u32, passed: &[RawFd]| {
            let parameters = json!({ "lease": 1, "epoch": 2, "process": process });
            read(call("org.hostler.Watchdog.Adopt", &parameters), passed)
        };
        let Read::Ask(asked) = adopt(1, &[40, 41]) else { panic!("it was passed") };
        assert!(matches!(*asked, Asked::Adopt(Adopt { process: 41, .. })), "{asked:?}");
        for (index, passed) in [(0, &[][..]), (2, &[40, 41][..]), (u32::MAX, &[40][..]), (0, &[-1][..])] {
            let Read::Say(reply) = adopt(index, passed) else { panic!("{index} is of none of {passed:?}") };
            assert_eq!(reply.error.as_deref(), Some("org.hostler.Watchdog.Refused"));
        }
    }

    #[test]
    fn every_method_is_known() {
        for name in NAMES {
            let answer = read(call(&format!("{INTERFACE}.{name}"), &json!({ "nonsense": 1 })), &[]);
            let Read::Say(reply) = answer else { panic!("{name} took what it does not know") };
            assert_eq!(reply.error.as_deref(), Some("org.varlink.service.InvalidParameter"), "{name}");
        }
    }
}
