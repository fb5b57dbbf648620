//! What a message that a handler sends has of the one that it handled.

use super::{Details, Head, MessageId, NewMessage, Reply};

/// What a handler sent while it handled `parent`, as it is to be stored: ids that follow from the parent's and the
/// position, so that a repeat collapses onto the first one; the parent as cause; its conversation and its trace,
/// unless the message says otherwise. The conversation of a parent that names none is the parent's id.
pub fn children(parent: &Head, sent: Vec<NewMessage>) -> Vec<NewMessage> {
    let child = |(position, mut message): (usize, NewMessage)| {
        message.id = MessageId::child(parent.id, position);
        let conversation = || parent.correlation_id.clone().or_else(|| Some(parent.id.to_string()));
        message.correlation_id = message.correlation_id.or_else(conversation);
        let details = &mut message.details;
        details.causation_id = Some(parent.id.to_string());
        if details.traceparent.is_none() {
            details.traceparent.clone_from(&parent.details.traceparent);
            details.tracestate.clone_from(&parent.details.tracestate);
            details.baggage.clone_from(&parent.details.baggage);
        }
        message
    };
    sent.into_iter().enumerate().map(child).collect()
}

/// The answer to a message as a message to the queue that it names for that, if it names one. It comes after all else
/// that its handler sent.
pub fn reply_to(parent: &Head, reply: Reply) -> Option<NewMessage> {
    let queue = parent.details.reply_to.clone()?;
    let Reply { content_type, body } = reply;
    let details = Details { content_type, ..Details::default() };
    Some(NewMessage { details, ..NewMessage::new(queue, body) })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use crate::model::{Details, QueueName};

    use super::*;

    fn parent() -> Head {
        Head {
            id: MessageId::new(),
            queue: QueueName::parse("a").unwrap(),
            kind: None,
            correlation_id: Some("order-17".to_owned()),
            details: Details { traceparent: Some("00-trace".to_owned()), ..Details::default() },
            priority: 0,
            enqueued_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
        }
    }

    fn message() -> NewMessage {
        NewMessage::new(QueueName::parse("b").unwrap(), "x")
    }

    #[test]
    fn a_repeat_has_the_same_ids_and_no_two_messages_have_one() {
        let parent = parent();
        let ids = |parent: &Head| {
            let sent = children(parent, vec![message(), message()]);
            sent.into_iter().map(|message| message.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(&parent), ids(&parent));
        assert_ne!(ids(&parent)[0], ids(&parent)[1]);
        assert_ne!(ids(&parent)[0], ids(&Head { id: MessageId::new(), ..parent.clone() })[0]);
    }

    #[test]
    fn the_parent_is_the_cause_and_the_conversation_goes_on() {
        let parent = parent();
        let own = NewMessage { correlation_id: Some("another".to_owned()), ..message() };
        let sent = children(&parent, vec![message(), own]);
        assert_eq!(sent[0].correlation_id.as_deref(), Some("order-17"));
        assert_eq!(sent[1].correlation_id.as_deref(), Some("another"));
        for message in &sent {
            assert_eq!(message.details.causation_id, Some(parent.id.to_string()));
            assert_eq!(message.details.traceparent.as_deref(), Some("00-trace"));
        }
        let root = Head { correlation_id: None, ..parent };
        let sent = children(&root, vec![message()]);
        assert_eq!(sent[0].correlation_id, Some(root.id.to_string()), "it began the conversation");
    }
}
