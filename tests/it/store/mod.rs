//! Does every store keep every promise of the trait `Store`?
//!
//! A promise is an async function in one of the files here, named as a sentence, that takes a
//! [`Stage`](crate::support::stage::Stage). Each is a test of each store: `store::memory::…`,
//! `store::sqlite::…`, `store::postgres::…`. A promise that is not in the list below is dead code, and
//! the compiler says so. Some stores go by a clock that cannot be moved, so that promises about time
//! use a span that is meant to end ([`SHORT`](crate::support::stage::SHORT)) or one that never does
//! ([`LONG`](crate::support::stage::LONG)), and never hurry to be in between.

mod sending;
mod topics;
mod outside;
mod keys;
mod leasing;
mod settling;
mod upkeep;
mod queues;
mod surgery;
mod listing;
mod groups;
mod fairness;
mod crowds;
mod races;
mod program;
mod player;
mod props;
mod cluster;
mod plans_sqlite;
mod one_file;
mod handover;
mod counts;
mod plans_postgres;
mod replicas;
mod adversity;
mod frozen;
mod broken_rows;

/// How long one promise may take; a store that hangs is a store that fails.
const PROMISE_MAX: std::time::Duration = std::time::Duration::from_secs(120);

/// A test of each promise of one theme, on a fresh stage.
macro_rules! keeps {
    ($stage:path; $theme:ident: $($promise:ident),+ $(,)?) => {
        mod $theme {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    let stage = $stage().await;
                    let promise = crate::store::$theme::$promise(stage);
                    let kept = tokio::time::timeout(crate::store::PROMISE_MAX, promise).await;
                    kept.expect("a store answers in time");
                }
            )+
        }
    };
}

/// Every promise there is.
macro_rules! conformance {
    ($stage:path) => {
        keeps!($stage; sending:
            what_is_sent_is_kept_byte_for_byte,
            an_empty_payload_is_a_payload,
            a_receipt_says_when_a_message_is_due,
            a_moment_that_has_passed_counts_as_now,
            messages_sent_together_keep_their_order,
            nothing_can_be_sent,
            an_unknown_queue_is_refused_and_the_rest_is_taken,
            an_atomic_batch_is_all,
            an_atomic_batch_is_nothing_and_every_refusal_is_named,
            a_full_queue_refuses_until_something_is_settled,
            a_limit_that_is_lifted_lets_messages_in,
            whoever_listens_hears_of_messages,
            a_message_with_a_known_name_is_a_duplicate,
        );
        keeps!($stage; topics:
            what_is_published_is_copied_into_each_queue_that_wants_it,
            what_nobody_wants_is_fine_unless_somebody_has_to,
            a_subscription_is_in_force_for_the_next_publish,
            a_repeated_publish_is_answered_with_the_first,
            a_full_queue_refuses_the_whole_publish,
            a_payload_of_several_lasts_as_long_as_the_last,
            what_a_handler_publishes_comes_with_its_ack,
            what_a_handler_publishes_becomes_no_more_copies_than_one_transaction_makes,
            what_wants_its_answer_in_no_queue_does_not_go_with_an_ack,
            a_publish_under_a_known_name_collapses_queue_by_queue,
        );
        keeps!($stage; outside:
            what_is_held_outside_is_bounded_and_outlives_its_process,
            what_is_held_is_known_by_its_ticket,
            a_schedule_is_turned_by_whoever_saw_it_last,
        );
        keeps!($stage; keys:
            of_a_unique_key_one_message_is_pending_at_a_time,
            a_unique_key_says_nothing_of_what_is_dead,
            a_repeat_is_answered_with_the_first_receipt,
            a_repeat_is_answered_as_it_was_then_whatever_became_of_the_message,
            a_key_belongs_to_one_request,
            a_key_counts_in_its_queue_only,
            of_two_messages_with_one_key_in_one_call_the_second_is_the_duplicate,
            a_message_with_two_keys_is_known_by_each,
            a_repeat_is_answered_on_a_full_queue_too,
            what_was_refused_leaves_no_key,
            an_atomic_batch_that_is_refused_leaves_no_key,
            an_atomic_batch_names_a_key_that_was_reused,
            a_key_over_a_batch_belongs_to_one_request,
            a_key_over_a_batch_of_which_nothing_was_taken_is_not_kept,
            sixty_four_senders_of_one_request_make_one_message,
            senders_that_cross_their_keys_do_not_lock_each_other_out,
            a_key_is_forgotten_after_its_window,
            a_key_over_a_batch_is_forgotten_after_its_window,
            a_key_in_its_window_is_kept_when_its_message_is_gone,
            a_key_outlives_its_window_while_its_message_lives_or_is_dead,
        );
        keeps!($stage; leasing:
            a_claim_hands_over_the_message_and_counts_the_attempt,
            higher_priority_goes_first_then_arrival,
            of_one_priority_the_longest_due_goes_first,
            a_retried_message_goes_by_when_it_is_due_again,
            a_released_message_keeps_its_place,
            a_claim_takes_no_more_than_it_asks_for,
            a_claim_takes_from_its_own_queue,
            contents_of_all_kinds_are_claimed_together_and_kept_apart,
            what_is_due_later_is_not_leased,
            what_has_expired_is_passed_over,
            a_leased_message_is_nobody_elses,
            every_claim_has_a_token_of_its_own,
            a_claim_for_what_is_urgent_takes_nothing_else,
            a_usual_claim_takes_what_is_urgent_too,
            claims_at_the_same_time_never_hand_a_message_out_twice,
            a_lease_that_is_renewed_holds_longer,
            renewing_says_for_each_lease_whether_it_holds,
        );
        keeps!($stage; settling:
            an_ack_completes,
            a_settlement_says_how_old_the_message_is,
            a_retry_at_once_is_ready_and_counts_a_failure,
            a_retry_later_is_scheduled_and_counts_a_failure,
            a_dead_letter_is_set_aside_with_its_reason,
            a_discarded_message_keeps_its_reason,
            a_release_counts_nothing_and_uses_up_the_number,
            what_is_postponed_counts_nothing_and_waits,
            what_is_moved_keeps_all_but_its_budget,
            what_cannot_be_moved_is_dead,
            the_latest_hundred_deliveries_are_kept,
            numbers_of_attempts_are_never_used_twice,
            the_record_of_a_delivery_is_kept_the_latest_first,
            of_two_records_of_one_attempt_the_first_counts,
            a_delivery_that_never_started_leaves_no_record,
            a_second_settlement_changes_nothing,
            settlements_of_all_kinds_at_once_are_each_done,
            an_old_token_changes_nothing_and_sends_nothing,
            a_lease_that_is_lost_is_lost_whatever_was_to_be_sent,
            a_forged_token_changes_nothing,
            a_lease_that_has_run_out_settles_nothing,
            of_many_settlements_at_the_same_time_one_is_written,
            what_a_handler_sends_comes_with_its_ack,
            what_a_handler_sends_is_dropped_without_an_ack,
            an_ack_that_sends_to_an_unknown_queue_changes_nothing,
            whoever_listens_hears_of_what_returns,
        );
        keeps!($stage; upkeep:
            what_comes_due_is_made_ready,
            promoting_takes_the_longest_due_and_no_more_than_asked,
            a_lease_that_has_run_out_is_taken_back_and_counts_as_a_crash,
            a_lost_lease_leaves_a_record_of_its_delivery,
            reaping_takes_back_no_more_than_asked,
            a_message_that_crashes_too_often_is_dead,
            failures_and_crashes_are_counted_apart,
            what_waits_too_long_expires,
            what_expires_is_set_aside_if_its_queue_asks_for_it,
            what_is_leased_or_dead_does_not_expire,
            what_has_ended_is_deleted_after_its_retention,
            dead_letters_have_a_retention_of_their_own,
            nothing_is_deleted_before_its_retention,
            sweeping_stops_at_its_limit_and_says_so,
            a_process_alone_may_open_all_it_wants,
            reporting_again_takes_no_lease_away,
            the_revision_follows_every_change_of_queues_and_pump,
        );
        keeps!($stage; queues:
            a_queue_is_what_was_put,
            a_guard_changes_once_and_whoever_listens_hears_of_it,
            another_handler_or_breaker_begins_anew,
            queues_are_listed_by_name,
            replacing_settings_keeps_run_state_and_messages,
            a_queue_is_put_only_if_the_precondition_holds,
            of_two_operators_with_one_etag_one_wins,
            a_queue_that_has_messages_is_not_deleted,
            a_queue_deleted_by_force_takes_everything_with_it,
            a_queue_is_deleted_only_if_the_precondition_holds,
            a_queue_is_stopped_and_started,
            the_pump_of_a_new_store_runs_and_remembers_what_it_is_told,
            whoever_listens_hears_of_settings,
            a_store_that_works_says_so_and_closes_twice,
        );
        keeps!($stage; surgery:
            what_waits_can_be_cancelled,
            what_is_due_later_can_be_run_now,
            what_is_ready_keeps_its_place_when_it_is_run_now,
            what_waits_can_be_rescheduled,
            what_is_rescheduled_is_no_longer_urgent,
            only_what_waits_can_be_amended,
            a_dead_letter_that_is_redriven_starts_anew,
            redriven_messages_line_up_behind_what_is_due,
            a_redriven_message_does_not_expire_at_once,
            redriving_takes_the_oldest_and_no_more_than_asked,
            redriving_takes_what_the_filter_means,
            a_dead_letter_can_be_deleted,
            only_a_dead_letter_can_be_deleted,
            a_purge_deletes_what_waits_and_nothing_else,
            a_purge_stops_at_its_limit,
            a_purge_keeps_the_keys,
        );
        keeps!($stage; groups:
            of_a_group_one_message_is_out_at_a_time_and_in_order,
            a_group_holds_up_nobody_else,
            a_message_that_is_tried_again_keeps_its_place,
            a_message_that_comes_back_keeps_its_place,
            a_message_whose_lease_ran_out_keeps_its_place,
            after_one_that_is_dead_the_next_one_goes,
            a_dead_one_blocks_its_group_until_it_is_redriven,
            a_dead_one_blocks_its_group_until_it_is_deleted,
            a_dead_one_blocks_its_group_until_the_queue_says_otherwise,
            a_dead_one_blocks_its_group_until_its_retention_ends,
            what_is_redriven_lines_up_again,
            who_waits_can_be_cancelled_expire_and_be_purged,
            who_waits_in_a_group_cannot_jump_the_queue,
            what_is_moved_lines_up_in_the_group_of_the_other_queue,
            what_a_handler_sends_to_its_own_group_comes_after_it,
            a_group_with_one_that_cannot_be_handled_forever_is_found_by_its_name,
            those_who_wait_in_a_group_are_counted,
            what_was_purged_is_in_nobodys_way,
            a_queue_that_is_deleted_takes_its_groups_with_it,
        );
        keeps!($stage; fairness:
            those_who_wait_take_turns,
            turns_go_on_where_the_last_claim_ended,
            priority_comes_before_fairness,
            without_keys_the_order_is_that_of_arrival,
            those_who_are_alone_get_everything,
        );
        keeps!($stage; crowds:
            in_a_crowd_each_message_is_acked_once,
            what_comes_and_goes_at_the_same_time_is_counted,
            after_any_program_depths_are_what_listing_counts,
        );
        keeps!($stage; listing:
            a_rare_match_is_found_page_by_page,
            what_is_not_there_is_not_found,
            messages_are_listed_newest_first_as_they_are_found_one_by_one,
            a_filter_shows_what_it_means,
            pages_show_each_message_once,
            a_list_is_stable_while_messages_are_added,
            a_list_is_stable_while_messages_are_deleted,
            depths_show_every_queue_also_an_empty_one,
            a_depth_says_how_long_the_oldest_has_been_due,
        );
    };
}

/// The promises of stores that are databases: what has just been committed is handed over, and a claim reads it in
/// portions.
macro_rules! database {
    ($stage:path) => {
        keeps!($stage; handover:
            a_message_is_handed_over_as_if_it_had_been_claimed,
            without_a_place_a_message_waits_and_those_after_it_too,
            of_several_queues_in_one_call_each_is_looked_at_alone,
            what_is_not_due_too_late_or_of_another_queue_is_not_handed_over,
            what_is_refused_gives_its_places_back,
            what_nobody_takes_any_more_is_ready_at_once,
            a_lease_that_was_handed_over_runs_out_like_any_other,
            who_closes_takes_no_more_and_another_is_left_alone,
        );
        keeps!($stage; leasing:
            a_claim_reads_no_more_bytes_than_are_good_for_it,
        );
    };
}

mod memory {
    conformance!(crate::support::stores::memory);
}

mod sqlite {
    conformance!(crate::support::stores::sqlite);
    mod as_database {
        database!(crate::support::stores::sqlite);
    }
}

mod postgres {
    conformance!(crate::support::stores::postgres);
    mod as_database {
        database!(crate::support::stores::postgres);
    }
}
